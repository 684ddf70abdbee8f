"""Breadth: every architecture of the zoo, both spellings, found, proven and replaced unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from torch import Tensor

from reattend import convert, find_attention, load
from reattend.inputs import made_up

#: layers that are looked at, where one is not enough
LAYERS = {"gpt_oss": 2}
#: sites per model, if not one; one per block of attention, cross-attention counted
SITES = {
    "t5": 3,
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_vision", "gpt_neo", "hrm_text", "gpt_oss"), 2),
}
FAST = {("llama", "sdpa"), ("qwen3", "eager"), ("gpt2", "sdpa"), ("bert", "sdpa")}
CASES = [
    pytest.param(name, how, marks=[] if (name, how) in FAST else [pytest.mark.slow])
    for name in zoo_models.ZOO
    for how in ("sdpa", "eager")
    if (name, how) != ("gemma2", "sdpa")  # its class only has the eager spelling
]
CASES += [pytest.param(name, None, marks=[pytest.mark.slow]) for name in zoo_models.MORE]


def _inputs(model: Any, batch: int, length: int, pad: int) -> tuple[dict[str, Any], Tensor]:
    """Made-up inputs with the first row left-padded, and the real positions of the output."""
    inputs = made_up(model, batch, length)
    target = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if target is None:
        return inputs, torch.ones(batch, dtype=torch.bool)
    real = torch.ones(target.shape, dtype=torch.bool)
    if pad:
        inputs["attention_mask"][0, :pad] = 0
        if "decoder_input_ids" not in inputs:
            real[0, :pad] = False
    return inputs, real


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(("name", "how"), CASES)
def test_identity_equals_the_original_with_and_without_a_cache(name: str, how: str | None) -> None:
    model = zoo_models.build(name, how, LAYERS.get(name, 1))
    result = convert(model, plan="identity")
    assert result.report.totals.converted == SITES.get(name, 1)
    assert result.report.totals.verified == result.report.totals.converted
    for batch, length, pad in ((2, 19, 0), (3, 31, 4)):
        inputs, real = _inputs(model, batch, length, pad)
        expected, got = _logits(model, inputs)[real], _logits(result.model, inputs)[real]
        assert (got - expected).abs().max() <= 1e-4
    if model.can_generate() and name not in ("bert", "albert"):
        _assert_generates_alike(model, result.model)


def _assert_generates_alike(model: Any, converted: Any) -> None:
    inputs, _ = _inputs(model, 2, 11, 3)
    asked = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    run = {"max_new_tokens": 10, "do_sample": False}
    assert bool((model.generate(**asked, **run) == converted.generate(**asked, **run)).all())


def test_sites_describe_what_is_there() -> None:
    found = find_attention(zoo_models.build("mistral", layers=1))
    assert [s.path for s in found.sites] == ["model.layers.0.self_attn"]
    assert not found.refused
    site = found.sites[0]
    assert site.verified
    assert site.spec.core.kv_heads == 2
    assert (site.spec.core.pattern.kind, site.spec.core.pattern.window) == ("sliding", 8)


@pytest.mark.slow
def test_a_converted_model_is_an_input_again() -> None:
    once = convert(zoo_models.build("llama", layers=1), plan="identity").model
    data = torch.randint(3, 97, (8, 40))
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 14, "qk_rope_head_dim": 8}]}
    twice = convert(once, plan=plan, data=data)
    assert twice.report.totals.converted == 1
    again = find_attention(twice.model)
    assert not again.sites
    assert again.refused and all("already latent" in r.reason for r in again.refused)


@pytest.mark.slow
def test_images_still_see_each_other_both_ways() -> None:
    """Found on text, a vision-language model keeps its image masks: they are the model's own."""
    model = zoo_models.build("gemma3_vision")
    converted = convert(model, plan="identity").model
    ids = torch.randint(10, 90, (2, 23))
    ids[:, 3:7] = 5
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == 5).long(), "pixel_values": torch.randn(2, 3, 16, 16),
    }  # fmt: skip
    expected = _logits(model, inputs)
    assert (_logits(converted, inputs) - expected).abs().max() <= 1e-4


#: what a checkpoint must carry beyond weights: sinks, slopes, a gate, programs of joins and streams
KINDS = ["gpt_oss", "falcon_alibi", "qwen3_next", "bitnet", "cohere_norm"]


@pytest.mark.parametrize(
    "name", [KINDS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in KINDS[1:])]
)
def test_every_kind_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = zoo_models.build(name, None, layers=1)
    out = tmp_path / "out"
    converted = convert(model, plan="identity", out=out).model
    inputs, real = _inputs(model, 3, 13, 4)
    loaded = load(out)
    assert bool((_logits(loaded, inputs) == _logits(converted, inputs)).all())
    asked = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    run = {"max_new_tokens": 12, "do_sample": False}
    assert bool((model.generate(**asked, **run) == loaded.generate(**asked, **run)).all())
