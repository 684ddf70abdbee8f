"""Exporting a converted model: torch's logits in two runtimes, one node per head group."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tiny import MLA, VOCABULARY, converted, sequences, tiny, torch_logits
from transformers import GenerationConfig

from reattend.errors import GateError, OutputError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from reattend.targets.onnx import Artifact, Session, export_onnx  # noqa: E402
from reattend.targets.onnx.functions import DOMAIN  # noqa: E402
from reattend.targets.onnx.manifest import SCHEMA  # noqa: E402

PLANS: dict[str, Any] = {
    "mla": {"rules": [{"sites": "*", **MLA}]},
    "identity": "identity",
    "mixed": {
        "rules": [
            {"sites": "*", "heads": [1], "to": "mla", "kv_lora_rank": 6, "qk_rope_head_dim": 4},
            {"sites": "*", "to": "dense"},
        ]
    },
}


OPS = {
    "mla": ["LatentAttention"],
    "identity": ["Attention"],
    "mixed": ["Attention", "LatentAttention"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Artifact]]:
    """plan -> (torch model, its float32 export); each is exported once."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("onnx")
    found = {}
    for name, plan in PLANS.items():
        model = converted(plan)
        found[name] = model, export_onnx(model, folder / name)
    return found


@pytest.mark.parametrize("plan", PLANS)
def test_prefill_single_steps_and_a_chunk_equal_torch(made: Any, plan: str) -> None:
    model, artifact = made[plan]
    ids, mask = sequences(2, 7 + 32 + 5, padding=3)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1)
    got = [session.prefill(ids[:, :7].numpy(), mask[:, :7].numpy())]
    got += [session.step(ids[:, i : i + 1].numpy()) for i in range(7, 39)]
    got.append(session.step(ids[:, 39:].numpy()))
    real = mask.bool().numpy()
    assert np.abs(expected).max() > 1
    assert np.abs(np.concatenate(got, 1) - expected)[real].max() <= 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_reference_evaluator_gives_the_same(made: Any, plan: str) -> None:
    """A second oracle: onnx's own evaluator runs the same file, states passed on by hand."""
    model, artifact = made[plan]
    pieces = (6, *[1] * 32, 5)
    ids, mask = sequences(2, sum(pieces), padding=2)
    expected = torch_logits(model, ids, mask)
    evaluator = ReferenceEvaluator(str(artifact.model))
    sizes = {"B": 2, "C": sum(pieces) + 1}
    states = {
        s.input: np.zeros([sizes.get(x, x) for x in s.shape], np.float32)
        for s in artifact.manifest.states
    }
    names = ["logits", *(s.output for s in artifact.manifest.states)]
    got, seen = [], 0
    for n in pieces:
        total = mask[:, : seen + n].numpy()
        position = np.maximum(total.cumsum(1) - 1, 0)[:, seen:]
        feed = {
            "input_ids": ids[:, seen : seen + n].numpy(), "attention_mask": total,
            "position_ids": position,
        }  # fmt: skip
        logits, *written = evaluator.run(names, feed | states)
        states = dict(zip(states, written, strict=True))
        got.append(logits)
        seen += n
    assert np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max() <= 1e-4


@pytest.mark.parametrize("plan", PLANS)
def test_one_node_per_head_group_with_its_function(made: Any, plan: str) -> None:
    _, artifact = made[plan]
    proto = onnx.load(artifact.model, load_external_data=False)
    ours = [n for n in proto.graph.node if n.domain == DOMAIN]
    assert [n.op_type for n in ours] == OPS[plan] * 2
    assert [(f.domain, f.name) for f in proto.functions] == [(DOMAIN, op) for op in OPS[plan]]
    assert [(e.layer, e.op) for e in artifact.manifest.layers] == [
        (layer, op) for layer in (0, 1) for op in OPS[plan]
    ]
    assert {o.domain: o.version for o in proto.opset_import} == {"": 24, DOMAIN: 1}
    inside = {n.domain for f in proto.functions for n in f.node}
    assert inside == {""}
    softmax = [
        n for n in proto.graph.node if n.op_type in ("Softmax", "Attention") and not n.domain
    ]
    assert not softmax  # the model's own mask and attention are gone


@pytest.mark.parametrize("plan", PLANS)
def test_states_are_read_where_they_were_written(made: Any, plan: str) -> None:
    """Nothing may copy a state, and nothing may read one from before its TensorScatter."""
    _, artifact = made[plan]
    graph = onnx.load(artifact.model, load_external_data=False).graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for state in artifact.manifest.states:
        kinds = {n.op_type for n in readers[state.input]}
        assert kinds <= {"TensorScatter", "Shape"}
        (reader,) = {n.op_type for n in readers[state.output]}
        latent = state.name.rpartition(".")[2] in ("latent", "rope")
        assert reader == ("LatentAttention" if latent else "Attention")


def test_sizes_are_dynamic(made: Any) -> None:
    _, artifact = made["mla"]
    graph = onnx.load(artifact.model, load_external_data=False).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*graph.input, *graph.output]
    }
    assert shapes["input_ids"] == ["B", "N"]
    assert shapes["attention_mask"] == ["B", "T"]
    assert shapes["logits"] == ["B", "N", VOCABULARY]
    assert shapes["state.1.latent"] == shapes["state_out.1.latent"] == ["B", "C", 10]
    assert shapes["state.1.rope"] == ["B", "C", 4]
    listed = {e.name: e.shape for e in [*artifact.manifest.inputs, *artifact.manifest.outputs]}
    assert listed == shapes


def test_states_of_head_groups_are_kept_apart(made: Any) -> None:
    manifest = made["mixed"][1].manifest
    shapes = {s.input: s.shape for s in manifest.states if s.layer == 1}
    assert shapes == {
        "state.1.0.key": ["B", 1, "C", 8], "state.1.0.value": ["B", 1, "C", 8],
        "state.1.1.latent": ["B", "C", 6], "state.1.1.rope": ["B", "C", 4],
    }  # fmt: skip
    assert manifest.cache_bytes_per_token == 2 * (8 + 8 + 6 + 4) * 4


def test_manifest_and_folder(made: Any) -> None:
    _, artifact = made["mla"]
    content = json.loads((artifact.path / "manifest.json").read_text())
    assert content["schema_version"] == SCHEMA
    assert content["cache_bytes_per_token"] == 2 * (10 + 4) * 4
    assert content["generation"] == {
        "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None
    }  # fmt: skip
    assert [c["steps"] for c in content["checks"]] == [1, 1, 1]
    assert artifact.max_error <= 1e-4
    assert (artifact.path / "model.onnx.data").stat().st_size > 10_000
    assert (artifact.path / "generation_config.json").is_file()
    assert not list(artifact.path.glob("*.tmp"))
    assert b".py" not in (artifact.path / "model.onnx").read_bytes()  # no traces of this machine


def test_the_same_call_again_does_nothing_and_another_is_refused(made: Any) -> None:
    model, artifact = made["mla"]
    before = artifact.model.stat().st_mtime_ns
    assert export_onnx(model, artifact.path).manifest == artifact.manifest
    assert artifact.model.stat().st_mtime_ns == before
    with pytest.raises(OutputError):
        export_onnx(made["identity"][0], artifact.path)


@pytest.mark.slow
def test_float16(made: Any, tmp_path: Path) -> None:
    model, _ = made["mla"]
    before = copy.deepcopy(model.state_dict())
    artifact = export_onnx(model, tmp_path / "half", dtype="float16")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert artifact.manifest.cache_bytes_per_token == 2 * (10 + 4) * 2
    ids, mask = sequences(2, 12, padding=3)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1)
    got = [session.prefill(ids[:, :10].numpy(), mask[:, :10].numpy())]
    got += [session.step(ids[:, i : i + 1].numpy()) for i in (10, 11)]
    assert got[0].dtype == np.float16
    real = mask.bool().numpy()
    error = np.abs(np.concatenate(got, 1).astype(np.float32) - expected)[real].max()
    assert error <= 3e-2 * np.abs(expected).max()


@pytest.mark.slow
def test_a_wrong_file_is_not_published(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate sees a mistake in the function body (here: no query sees its own key)."""
    from reattend.targets.onnx import dense_body

    wrong = dense_body._TILES.replace("LessOrEqual (row, last)", "Less (row, last)")
    assert wrong != dense_body._TILES
    monkeypatch.setattr(dense_body, "_TILES", wrong)
    with pytest.raises(GateError, match="torch's logits"):
        export_onnx(made["mla"][0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generation_ids_come_from_the_generation_config() -> None:
    from reattend.targets.onnx.manifest import generation

    model = tiny()
    model.generation_config = GenerationConfig(eos_token_id=[5, 6], pad_token_id=0)
    found = generation(model)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, [5, 6], 0)
