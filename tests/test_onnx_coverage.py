"""Which models and dtypes are exported, and which are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zoo_models
from onnx_tiny import MLA, VOCABULARY, converted, sequences, tiny, torch_logits
from transformers import LlamaModel

from reattend import convert
from reattend.errors import ArgumentError, NothingFoundError, RefusedError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from reattend.targets.onnx import Session, export_onnx  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("rope", [0, 8])
def test_rotary_part_of_any_width(rope: int, tmp_path: Path) -> None:
    rule = {"sites": "*", "to": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": rope}
    model = converted({"rules": [rule]})
    artifact = export_onnx(model, tmp_path / "out")
    names = {s.name for s in artifact.manifest.states}
    assert names == ({"latent", "rope"} if rope else {"latent"})
    ids, mask = sequences(2, 9, padding=2)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1)
    first = session.prefill(ids[:, :6].numpy(), mask[:, :6].numpy())
    got = np.concatenate([first, session.step(ids[:, 6:].numpy())], 1)
    assert np.abs(got - expected)[mask.bool().numpy()].max() <= 1e-4


@pytest.mark.slow
def test_sliding_window_and_softcap(tmp_path: Path) -> None:
    """Gemma 2: two masks, softcap, and a window shorter than the text."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=5,
        query_pre_attn_scalar=8, attn_logit_softcapping=3.0, max_position_embeddings=64,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model = convert(Gemma2ForCausalLM(config).eval(), plan="identity").model
    artifact = export_onnx(model, tmp_path / "out")
    ids, mask = sequences(2, 14, padding=2)
    expected = torch_logits(model, ids, mask)
    session = Session(artifact.path, threads=1)
    got = [session.prefill(ids[:, :8].numpy(), mask[:, :8].numpy())]
    got += [session.step(ids[:, i : i + 1].numpy()) for i in range(8, 14)]
    assert np.abs(np.concatenate(got, 1) - expected)[mask.bool().numpy()].max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "int8"])
def test_other_dtypes_are_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="float32") as caught:
        export_onnx(tiny(), tmp_path / "out", dtype=dtype)
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NothingFoundError, match="identity"):
        export_onnx(tiny(), tmp_path / "out")
    with pytest.raises(ArgumentError, match="head"):
        export_onnx(LlamaModel(tiny().config), tmp_path / "out")
    with pytest.raises(ArgumentError, match="an encoder is converted first"):
        export_onnx(zoo_models.build("vit", None), tmp_path / "out")


def test_a_partly_converted_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = converted({"rules": [{"layers": [0], **MLA}]})
    with pytest.raises(RefusedError, match="to: dense"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "words"), [("gpt_oss", "sinks"), ("falcon_alibi", "adds to")])
def test_scores_the_node_has_no_input_for_are_refused(
    name: str, words: str, tmp_path: Path
) -> None:
    model = convert(zoo_models.build(name, None), plan="identity").model
    with pytest.raises(RefusedError, match=words):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitnet", "cohere_norm"])
def test_a_models_own_steps_are_exported(name: str, tmp_path: Path) -> None:
    """The export itself compares logits with torch's."""
    model = convert(zoo_models.build(name, None), plan="identity").model
    artifact = export_onnx(model, tmp_path / "out")
    assert artifact.max_error <= 1e-4
