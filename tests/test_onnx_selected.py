"""Models whose heads choose keys at run time in ONNX: torch's logits, states, what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tiny import VOCABULARY, sequences, torch_logits

from reattend.errors import RefusedError
from reattend.mixers.sparse_config import HeadClass
from reattend.patterns.pattern import HeadPattern

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from test_onnx_sparse import build, in_reference, in_session  # noqa: E402

from reattend.targets.onnx import Artifact, Session, export_onnx  # noqa: E402
from reattend.targets.onnx.sparse_layout import sparse_form  # noqa: E402
from reattend.targets.onnx.state import FixedState  # noqa: E402
from reattend.targets.onnx.verify import torch_calls  # noqa: E402

MOBA: dict[str, Any] = {"kind": "blocks", "block": 4, "topk": 3}
POOLED = {"kind": "blocks", "block": 8, "queries": "pooled", "ratio": 0.4}
LABELS = {"kind": "channels", "share": 0.3, "topk": 5}
ATTENDED = {"kind": "blocks", "block": 4, "topk": 4, "key": "attended", "first": 1, "last": 2}
CHUNKS = {"kind": "segments", "window": 2, "apart": 3, "longest": 6, "local": 4, "topk": 16}
LEARNS = {"to": "sparse", "finder": "gate", "steps": 5}
#: a padded prompt, single steps, chunks longer and shorter than blocks
PIECES = (7, *[1] * 9, 17, 1, 3)
#: layer 0: a node of its own for every head; layer 1 notes what 2 reads
PLAN: dict[str, Any] = {
    "rules": [
        {
            "layers": [0], "heads": [0, 1, 2], **LEARNS,
            "pattern": {"select": {"kind": "gate", "block": 5, "gate_dim": 6, "topk": 3}},
            "head_patterns": [
                {"kv_heads": [1], "pattern": {"select": CHUNKS}},
                {"kv_heads": [2], "pattern": {"select": {"kind": "values", "topk": 9}}},
            ],
        },
        {
            "layers": [0], "to": "sparse", "pattern": {"select": MOBA},
            "head_patterns": [
                {"kv_heads": [1], "pattern": {"sinks": 2, "window": 3, "select": POOLED}},
                {"kv_heads": [2], "pattern": {"select": LABELS}},
                {"kv_heads": [3], "pattern": {"select": ATTENDED}},
                {"kv_heads": [4], "pattern": {"select": {**MOBA, "first": 1}}},
            ],
        },
        {
            "sites": "*", "to": "sparse",
            "pattern": {"select": {"kind": "recorded", "at": [1], "topk": 6}},
        },
    ]
}  # fmt: skip
OPS = [
    "GateAttention", "SegmentsAttention", "ValuesAttention", "BlocksAttention",
    "PooledBlocksAttention", "ChannelsAttention", "AttendedBlocksAttention",
    "AnchoredBlocksAttention", "NotingAttention", "NotedAttention",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    model = build(PLAN, layers=3, kv_heads=8)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")


@pytest.mark.slow
def test_a_prompt_single_steps_and_chunks_equal_torch_with_a_cache(made: Any) -> None:
    """In the same calls: what is chosen depends on them, and in one pass it is something else.

    No token comes twice: in a first layer equal tokens have equal values, and which of them has the
    better score is then up to rounding.
    """
    model, artifact = made
    ids, mask = sequences(2, sum(PIECES), padding=3)
    ids = torch.stack([torch.randperm(VOCABULARY)[: ids.shape[1]] for _ in ids])
    begins = [sum(PIECES[:i]) for i in range(len(PIECES))]
    want = torch_calls(model, ids, mask, begins).numpy()
    real = mask.bool().numpy()
    assert np.abs(torch_logits(model, ids, mask) - want)[real].max() > 1
    for feed in (in_session(Session(artifact.path, threads=1)), in_reference(artifact)):
        got = [
            feed(ids[:, at : at + n].numpy(), mask[:, : at + n].numpy())
            for at, n in zip(begins, PIECES, strict=True)
        ]
        assert np.abs(np.concatenate(got, 1) - want)[real].max() <= 1e-4


def test_states_hold_what_is_chosen_by_beside_every_row(made: Any) -> None:
    artifact = made[1]
    manifest = artifact.manifest
    assert [e.op for e in manifest.layers] == OPS
    saves = [e.saves for e in manifest.layers]
    assert all("no memory" in x for i, x in enumerate(saves) if i != OPS.index("NotingAttention"))
    assert "prompts are dense" in saves[5] and "decoding is dense" in saves[4]
    more = {s.input: s.shape for s in manifest.states if s.name[-3:] not in ("key", "lue")}
    assert more == {
        "state.0.0.summary": ["B", 1, "C/5", 6],
        "state.0.1.logit": ["B", 1, "C", 1],
        "state.0.2.score": ["B", 1, "C", 1],
        "state.0.3.summary": ["B", 1, "C/4", 8],
        "state.0.5.label": ["B", 1, "C", 2],
        "state.0.6.summary": ["B", 1, "C/4", 16],
        "state.0.6.recent": ["B", 1, 4, 16],
        "state.0.7.summary": ["B", 1, "C/4", 8],
    }
    beside = 6 / 5 + 1 + 1 + 8 / 4 + 2 + 16 / 4 + 8 / 4
    assert manifest.cache_bytes_per_token == np.ceil(4 * (3 * 128 + beside))
    assert manifest.cache_bytes_fixed == 4 * 4 * 16
    assert [(c.prefill, c.share) for c in manifest.checks] == [(6, 1.0), (9, 1.0), (64, 0.5)]
    session = Session(artifact.path, threads=1)
    ids, _ = sequences(2, 18, padding=0)
    session.prefill(ids[:, :17].numpy())
    held = zip(manifest.states, session.states.arrays, strict=True)
    assert [a.shape[2] for s, a in held if s.input in more] == [4, 17, 17, 5, 17, 5, 4, 5]
    got = session.step(ids[:, 17:].numpy())  # the states move to larger buffers
    again = Session(artifact.path, threads=1, capacity=64)
    again.prefill(ids[:, :17].numpy())
    assert np.abs(again.step(ids[:, 17:].numpy()) - got).max() <= 1e-4


def test_what_no_node_chooses_is_refused_by_name(made: Any) -> None:
    config = made[0].model.layers[1].self_attn.mixer.config
    for pattern, words in (
        ({"select": MOBA, "window": 2, "window_slope": 0.5}, r"pattern\.window_slope"),
        ({"select": {"kind": "observed", "ratio": 0.3}}, "select: observed"),
        ({"select": {**POOLED, "first": 1}}, r"select\.first"),
        ({"select": {**MOBA, "tile": [2, 2], "shape": [4, 4]}}, r"select\.shape, select\.tile"),
    ):
        head_class = HeadClass(kv_heads=(0,), pattern=HeadPattern.model_validate(pattern))
        with pytest.raises(RefusedError, match=words):
            sparse_form("here", config, head_class)


def test_a_layer_that_reads_notes_of_none_is_refused() -> None:
    select = {"kind": "recorded", "at": [0], "topk": 4, "layer": 1}
    cache: Any = SimpleNamespace(notes={2: None})
    state = FixedState(SimpleNamespace(), {}, cache)  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="layer 0 chose, which chose none"):
        state.noted(HeadPattern.model_validate({"select": select}))
