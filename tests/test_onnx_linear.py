"""Models with linear attention in ONNX: torch's logits, constant states, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_onnx_sparse import PIECES, build, error_over, in_reference, in_session

from reattend.errors import RefusedError
from reattend.plan import Plan

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from reattend.targets.onnx import Artifact, Session, export_onnx  # noqa: E402

#: a window of each form, decays, features of two kinds, and a state alone
RULES: tuple[dict[str, Any], ...] = (
    {"layers": [0], "window": 3, "feature_dim": 4, "feature_init": "uniform"},
    {
        "layers": [1], "window": 4, "window_form": "sliding", "feature_map": "elu+1",
        "decay": "fixed", "state": "per-kv-head", "mix": "fixed", "mix_start": 0.4,
    },
    {"layers": [2], "window": 0, "feature_map": "t2r", "decay": "fixed", "rope": "after",
     "normalize": "group"},
)  # fmt: skip
#: gated by its keys, and averaged with a window, as the preset `liger`
GATED: dict[str, Any] = {
    "layers": [3], "window": 5, "window_form": "sliding", "mix_form": "averaged", "mix": "fixed",
    "mix_start": 0.5, "feature_map": "softmax", "normalize": "none", "decay": "gated",
    "rope": "window-only", "state": "per-kv-head",
}  # fmt: skip
ALONE: dict[str, Any] = {"window": 0, "feature_map": "elu+1", "state": "per-kv-head"}
#: a Mamba-2 layer, as the preset `mamba2`
SELECTIVE = {**Plan.load("mamba2").to_dict()["rules"][0], "layers": [4]}
FLOWING: dict[str, Any] = {"layers": [5], "window": 0, "feature_map": "sigmoid", "flow": True}
PLAN = {"rules": [*({"to": "linear", **rule} for rule in (*RULES, GATED, FLOWING)), SELECTIVE]}
OPS = ["WindowLinearAttention", "WindowLinearAttention", "LinearAttention"]
OPS += ["GatedLinearAttention", "SparseAttention", "LinearAttention", "LinearAttention"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Artifact]:
    torch.set_num_threads(1)
    model = build(PLAN, layers=6)
    with torch.no_grad():  # features of random weights, that differ from head to head
        for mixer in (model.model.layers[i].self_attn.mixer for i in (0, 2)):
            for x in (mixer.features_q, mixer.features_k):
                for weight in x.parameters():
                    weight.normal_(0, 0.7)
    return model, export_onnx(model, tmp_path_factory.mktemp("onnx") / "out")


def test_a_prompt_single_steps_and_chunks_equal_torch(made: Any) -> None:
    model, artifact = made
    assert error_over(model, in_session(Session(artifact.path, threads=1))) <= 1e-4


def test_reference_evaluator_gives_the_same(made: Any) -> None:
    assert error_over(made[0], in_reference(made[1])) <= 1e-4


def test_what_the_file_holds_and_what_the_manifest_says(made: Any) -> None:
    model, artifact = made
    proto = onnx.load(artifact.model, load_external_data=False)
    assert [n.op_type for n in proto.graph.node if n.domain == "ai.reattend"] == OPS
    manifest = artifact.manifest
    assert [entry.op for entry in manifest.layers] == [*OPS[:4], *OPS[5:]]
    shapes = {(s.layer, s.name): s.shape for s in manifest.states}
    assert shapes[0, "key"] == ["B", 4, 7, 8]  # two terraces of 3, and a row
    assert shapes[0, "state"] == ["B", 8, 8, 9]
    assert shapes[1, "state"] == ["B", 4, 8, 9]
    assert shapes[2, "state"] == ["B", 8, 8, 8]
    assert (2, "key") not in shapes
    assert shapes[3, "key"] == ["B", 4, 5, 8]
    assert shapes[3, "state"] == ["B", 4, 8, 8]
    assert shapes[4, "conv_query"] == ["B", 8, 3, 8]
    assert [shapes[5, name] for name in ("flows", "race")] == [["B", 8, 4, 8], ["B", 8, 1, 1]]
    assert manifest.cache_bytes_per_token == 0
    session = Session(artifact.path, threads=1)
    sizes = []
    for length in (9, 200):
        session.prefill(np.full((1, length), 5))
        held = [
            a for s, a in zip(manifest.states, session.states.arrays, strict=True) if s.capacity
        ]
        sizes.append(sum(a.nbytes for a in held))
    assert sizes[0] == sizes[1] == manifest.cache_bytes_fixed


@pytest.mark.slow
def test_onnx_runtimes_own_operator_sums_the_states(tmp_path: Path) -> None:
    decayed = {**RULES[2], "layers": [0], "to": "linear"}
    gated = {**GATED, "layers": [1], "to": "linear"}
    model = build({"rules": [decayed, gated, {"sites": "*", "to": "linear", **ALONE}]}, layers=3)
    artifact = export_onnx(model, tmp_path / "out", flavour="ort")
    assert {entry.form for entry in artifact.manifest.layers} == {"com.microsoft::LinearAttention"}
    assert artifact.manifest.functions == ["ai.reattend::SparseAttention"]
    assert error_over(model, in_session(Session(artifact.path, threads=1))) <= 1e-4


def test_what_has_no_form_is_refused(made: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="held in float32"):
        export_onnx(made[0], tmp_path / "half", dtype="float16")
    rule = {"sites": "*", "to": "linear", "window": 4}
    unrotated = rule | {"rope": "window-only"}
    terraced = GATED | rule | {"window_form": "terraced", "layers": [0]}
    chosen = rule | {"window": 0, "sparse_top": 0.5, "sparse_block": 4}
    for refused, way in (
        (unrotated, "rope: before"), (terraced, "window_form: sliding"), (chosen, "preset moba"),
    ):  # fmt: skip
        with pytest.raises(RefusedError, match=way):
            export_onnx(build({"rules": [refused]}, layers=1), tmp_path / "out")
    assert sum(PIECES) > 8 * 7  # every ring turns
