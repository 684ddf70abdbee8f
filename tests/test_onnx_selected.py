"""Models whose heads choose keys at run time in ONNX: torch's logits, states, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_tiny import sequences

from reattend.errors import RefusedError
from reattend.mixers.sparse_config import HeadClass
from reattend.patterns.pattern import HeadPattern

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from test_onnx_sparse import build, error_over, in_reference, in_session  # noqa: E402

from reattend.targets.onnx import Artifact, Session, export_onnx  # noqa: E402
from reattend.targets.onnx.sparse_layout import sparse_form  # noqa: E402

MOBA: dict[str, Any] = {"kind": "blocks", "block": 4, "topk": 3}
#: layer 0: routed heads, some beside sinks and a window, and full ones; layer 1: a trained gate
PLAN: dict[str, Any] = {
    "rules": [
        {
            "layers": [0], "to": "sparse", "pattern": {"select": MOBA}, "heads_full": [3],
            "head_patterns": [
                {
                    "kv_heads": [1],
                    "pattern": {
                        "sinks": 2, "window": 3,
                        "select": {"kind": "blocks", "block": 8, "ratio": 0.4},
                    },
                },
            ],
        },
        {
            "sites": "*", "to": "sparse", "finder": "gate", "steps": 5,
            "pattern": {"select": {"kind": "gate", "block": 5, "gate_dim": 6, "topk": 3}},
        },
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    model = build(PLAN)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")


def test_a_prompt_single_steps_and_chunks_equal_torch(made: Any) -> None:
    model, artifact = made
    for prefill_chunk in (512, 3):
        session = Session(artifact.path, threads=1, prefill_chunk=prefill_chunk)
        assert error_over(model, in_session(session)) <= 1e-4
    assert error_over(model, in_reference(artifact)) <= 1e-4


def test_what_is_chosen_is_held_in_blocks_beside_every_row(made: Any) -> None:
    manifest = made[1].manifest
    ops = ["BlocksAttention", "BlocksAttention", "Attention", "GateAttention"]
    assert [e.op for e in manifest.layers] == ops
    assert "no memory" in manifest.layers[0].saves
    shapes = {s.input: s.shape for s in manifest.states}
    assert shapes["state.0.1.summary"] == ["B", 1, "C/8", 8]
    assert shapes["state.1.summary"] == ["B", 4, "C/5", 6]
    # keys and values, then summaries: a mean key of two heads, of one, and a gate's of four
    assert manifest.cache_bytes_per_token == np.ceil(4 * (2 * 64 + 2 * 8 / 4 + 8 / 8 + 4 * 6 / 5))
    assert [(c.prefill, c.share) for c in manifest.checks] == [(6, 1.0), (9, 1.0), (64, 0.5)]
    session = Session(made[1].path, threads=1)
    ids, _ = sequences(2, 17, padding=0)
    session.prefill(ids[:, :9].numpy())
    rows = [a.shape[2] for a, s in zip(session.states.arrays, manifest.states, strict=True)
            if s.name.endswith("summary")]  # fmt: skip
    assert rows == [3, 2, 2]
    got = session.step(ids[:, 9:].numpy())  # the states move to larger buffers
    again = Session(made[1].path, threads=1, capacity=64)
    assert np.abs(again.prefill(ids.numpy())[:, 9:] - got).max() <= 1e-4


def test_what_no_node_chooses_is_refused_by_name(made: Any) -> None:
    config = made[0].model.layers[0].self_attn.mixer.config
    for pattern, words in (
        ({"select": MOBA, "window": 2, "window_slope": 0.5}, r"pattern\.window_slope"),
        ({"select": {**MOBA, "tile": [2, 2], "shape": [4, 4]}}, r"select\.shape, select\.tile"),
    ):
        head_class = HeadClass(kv_heads=(0,), pattern=HeadPattern.model_validate(pattern))
        with pytest.raises(RefusedError, match=words):
            sparse_form("here", config, head_class)
