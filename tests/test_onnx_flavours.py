"""The `ort` flavour: torch's logits from ONNX Runtime's own operators, and what stays portable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_tiny import MLA, VOCABULARY, converted, sequences, torch_logits
from transformers import Gemma2Config, Gemma2ForCausalLM

from reattend import convert, export
from reattend.errors import ArgumentError

onnx = pytest.importorskip("onnx")
onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from onnx import helper  # noqa: E402

from reattend.targets.onnx import Artifact, Session, export_onnx  # noqa: E402
from reattend.targets.onnx.contrib import group_queries  # noqa: E402
from reattend.targets.onnx.layout import layout  # noqa: E402

GROUP_QUERY = "com.microsoft::GroupQueryAttention"
MIXED = {"rules": [{"layers": [0], **MLA}, {"sites": "*", "to": "dense"}]}


def gemma() -> Any:
    """Two masks, a window shorter than the text, softcap, a scale of its own."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=5,
        query_pre_attn_scalar=11, attn_logit_softcapping=3.0, max_position_embeddings=64,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return convert(Gemma2ForCausalLM(config).eval(), plan="identity").model


MODELS = {
    "gemma2": gemma,
    "half latent": lambda: converted(MIXED),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Artifact]]:
    torch.set_num_threads(1)
    folder, found = tmp_path_factory.mktemp("onnx"), {}
    for name, build in MODELS.items():
        model = build()
        found[name] = model, export_onnx(model, folder / name, flavour="ort")
    return found


@pytest.mark.parametrize("name", MODELS)
def test_prefill_single_steps_and_a_chunk_equal_torch(made: Any, name: str) -> None:
    model, artifact = made[name]
    ids, mask = sequences(2, 7 + 32 + 5, padding=3)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1)
    got = [session.prefill(ids[:, :7].numpy(), mask[:, :7].numpy(), reserve=40)]
    held = session.states.pointers()
    got += [session.step(ids[:, i : i + 1].numpy()) for i in range(7, 39)]
    got.append(session.step(ids[:, 39:].numpy()))
    assert session.states.pointers() == held
    assert np.abs(expected).max() > 1
    assert np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max() <= 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_manifest_says_what_each_layer_became(made: Any, name: str) -> None:
    _, artifact = made[name]
    manifest = artifact.manifest
    assert (manifest.flavour, manifest.chunk_rows) == ("ort", 1)
    forms = [entry.form for entry in manifest.layers]
    kept = "ai.reattend::LatentAttention" if name == "half latent" else GROUP_QUERY
    assert forms == [kept, GROUP_QUERY]
    assert [bool(entry.reason) for entry in manifest.layers] == [kept != GROUP_QUERY, False]
    graph = onnx.load(artifact.model, load_external_data=False)
    nodes = [f"{n.domain}::{n.op_type}" for n in graph.graph.node]
    assert [n for n in nodes if "Attention" in n] == forms
    # What the operator writes itself is written nowhere else, and no layer spells its softmax.
    assert nodes.count("::TensorScatter") == (2 if name == "half latent" else 0)
    assert "::Softmax" not in nodes
    assert len(graph.functions) == (name == "half latent")


def test_states_have_the_names_of_the_portable_file(made: Any) -> None:
    for model, artifact in made.values():
        tensors = [t for layer in layout(model) for t in layer.tensors]
        states = artifact.manifest.states
        assert [(s.input, s.output, s.shape) for s in states] == [
            (t.input, t.output, t.letters) for t in tensors
        ]


def test_long_prompts_of_a_batch_in_pieces(made: Any) -> None:
    """Later pieces of a prompt run row by row, in the same states."""
    _, artifact = made["gemma2"]
    ids, mask = (t.numpy() for t in sequences(3, 23, padding=9))
    whole = Session(artifact.path, threads=1).logits(ids, mask)
    pieces = Session(artifact.path, threads=1, prefill_chunk=5).logits(ids, mask)
    assert np.abs(whole - pieces)[mask.astype(bool)].max() <= 1e-4


@pytest.mark.slow
def test_float16(made: Any, tmp_path: Path) -> None:
    model, _ = made["half latent"]
    artifact = export_onnx(model, tmp_path / "half", dtype="float16", flavour="ort")
    ids, mask = sequences(2, 12, padding=3)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1)
    got = [session.prefill(ids[:, :8].numpy(), mask[:, :8].numpy())]
    got += [session.step(ids[:, i : i + 1].numpy()) for i in range(8, 10)]
    got.append(session.step(ids[:, 10:].numpy()))
    error = np.abs(np.concatenate(got, 1).astype(np.float32) - expected)
    assert error[mask.bool().numpy()].max() <= 3e-2 * np.abs(expected).max()


def test_an_unknown_flavour_is_an_error_with_the_nearest(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="did you mean 'portable'") as caught:
        export(made["half latent"][0], "onnx", out=tmp_path / "out", flavour="portabel")
    assert caught.value.exit_code == 2
    with pytest.raises(ArgumentError, match="flavour is for the target onnx"):
        export(made["half latent"][0], "deepseek", out=tmp_path / "out", flavour="ort")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("width", "value_width", "causal", "words"),
    [
        (8, 8, 1, ""),
        (12, 12, 1, "12 is not a multiple of 8"),
        (8, 16, 1, "values of width 16"),
        (8, 8, 0, "not causal"),
    ],
)
def test_what_the_operator_cannot_express_stays_with_the_reason(
    width: int, value_width: int, causal: int, words: str
) -> None:
    shapes = {
        "input_ids": ["B", "N"], "attention_mask": ["B", "T"],
        "past": ["B"], "start": ["B"], "length": ["B"],
        "q": ["B", 4, "N", width], "k": ["B", 2, "N", width], "v": ["B", 2, "N", value_width],
        "state.key": ["B", 2, "C", width], "state.value": ["B", 2, "C", value_width],
    }  # fmt: skip
    value = helper.make_tensor_value_info
    whole = ("input_ids", "attention_mask", "past", "start", "length")
    given = [value(k, onnx.TensorProto.INT64 if k in whole else 1, s) for k, s in shapes.items()]
    made = {"y": ["B", 4, "N", value_width], "key": shapes["state.key"]}
    made["value"] = shapes["state.value"]
    rules = {"scale": 0.5, "causal": causal, "sliding_window": 0, "softcap": 0.0}
    written = ["q", "key", "value", "start", "length"]
    nodes = [
        helper.make_node("TensorScatter", ["state.key", "k", "past"], ["key"], axis=2),
        helper.make_node("TensorScatter", ["state.value", "v", "past"], ["value"], axis=2),
        helper.make_node("Attention", written, ["y"], domain="ai.reattend", **rules),
    ]
    graph = helper.make_graph(nodes, "one", given, [value(k, 1, s) for k, s in made.items()])
    model = onnx_ir.from_proto(helper.make_model(graph, ir_version=11))
    inputs = {value.name: value for value in model.graph.inputs}
    (form,) = group_queries(model, inputs["input_ids"], inputs["attention_mask"]).values()
    assert words in form.reason
    assert (form.op == GROUP_QUERY) == (not words)
    kinds = {node.op_type for node in model.graph}
    assert ("TensorScatter" in kinds) == ("GroupQueryAttention" not in kinds) == bool(words)
