"""Plans that divide a layer by heads, on whole models: generate, save, report, refuse, train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models
from decoder_models import MODELS, decoder, prompts
from safetensors.torch import load_file, save_file
from test_graph import InlinedBlock, tower
from transformers import (
    StaticCache,
)

from reattend import Plan, Report, convert, find_attention, load
from reattend.errors import RefusedError
from reattend.inputs import made_up
from reattend.mixers.mixed import MixedAttention
from reattend.passes.rewrite.mixed import Mixed, MixedOptions, PartOptions
from reattend.passes.rewrite.registry import conversion
from reattend.predict import predict
from reattend.preflight import choose, preflight
from reattend.rewriting import rewrite
from reattend.verify.parity import block_errors

RULES = [
    {"sites": "*", "heads": [1], "to": "keep"},
    {"sites": "*", "heads": [0, 3], "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 8},
]
MORE_FAMILIES = ("gpt2", "gemma3", "phi3")
#: numbers cached per token and layer: the latent of two heads, and two heads as they were
CACHED = 10 + 8 + 2 * 16


def build(name: str) -> Any:
    return decoder(name, layers=2, groups=4)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = torch.randint(3, 97, (8, 40))
    return {n: convert(build(n), plan={"rules": RULES}, data=data) for n in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_cached_generation_equals_uncached(results: Any, name: str) -> None:
    model = results[name].model
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **run, use_cache=False)
    got = model.generate(ids, **run, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    tokens = 3 * (13 + 15)
    for layer in got.past_key_values.layers:
        held = layer.keys.numel() + layer.values.numel()
        kept = 3 * 7 if getattr(layer, "is_sliding", False) else tokens  # window - 1
        assert held == kept * CACHED
    static = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(model.generate(ids, **run, past_key_values=static), expected)
    beams = {**run, "num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


@pytest.mark.slow
@pytest.mark.smoke
def test_the_report_lists_the_groups(results: Any) -> None:
    report = results["llama"].report
    site = report.sites[0]
    assert site.conversion == "mixed"
    assert site.exactness == "bounded"
    assert site.cost.after.cache_numbers_per_token == CACHED
    assert [(g.heads, g.conversion, g.cache_numbers_per_token) for g in site.groups] == [
        ((0, 3), "mla", 18), ((1, 2), "dense", 32)
    ]  # fmt: skip
    assert site.groups[0].options["kv_lora_rank"] == 10
    assert 0 < site.groups[0].error.discarded_energy < 1
    text = report.to_markdown()
    assert "heads 0, 3: mla (balance" in text
    assert "heads 1–2: dense" in text
    assert "converted to mla (some heads)" in text
    assert Report.load(json.loads(report.to_json())) == report


@pytest.mark.smoke
def test_saved_and_loaded_in_a_fresh_process(results: Any, tmp_path: Path) -> None:
    model = results["llama"].model
    results["llama"].save(tmp_path / "out")
    ids, mask = prompts()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
    code = (
        "import sys, torch, reattend; from safetensors.torch import load_file, save_file;"
        "from transformers import AutoModelForCausalLM as A; t = load_file(sys.argv[2]);"
        "m = A.from_pretrained(sys.argv[1]); y = m(t['ids'], attention_mask=t['mask']).logits;"
        "save_file({'y': y.detach()[t['mask'].bool()]}, sys.argv[3])"
    )
    given, made = tmp_path / "in.safetensors", tmp_path / "y.safetensors"
    save_file({"ids": ids, "mask": mask}, given)
    subprocess.run([sys.executable, "-c", code, tmp_path / "out", given, made], check=True)
    assert torch.equal(load_file(made)["y"], expected)
    assert type(load(tmp_path / "out").model.layers[0].self_attn.mixer) is MixedAttention


def test_a_mixed_model_is_found_again_and_refused(results: Any) -> None:
    found = find_attention(results["llama"].model)
    assert not found.sites
    assert [(r.path, r.reason) for r in found.refused] == [
        (f"model.layers.{i}.self_attn", "already mixed") for i in range(2)
    ]


def test_parts_at_their_exact_setting_are_the_original() -> None:
    model = build("llama")
    exact = {"to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 8, "fold": 1}
    rules = [{"sites": "*", "heads": [h], **exact, "allow_growth": True} for h in (0, 2)]
    result = convert(model, plan={"rules": rules}, data=torch.randint(3, 97, (4, 40)))
    assert result.report.sites[0].exactness == "exact"
    assert [p.verdict for p in result.report.parity if "original" in p.name] == ["pass"]


@pytest.mark.slow
def test_heads_that_hold_the_whole_block_make_an_ordinary_one() -> None:
    rule = {**RULES[1], "heads": [0, 1, 2, 3]}
    data = torch.randint(3, 97, (4, 40))
    result = convert(build("llama"), plan={"rules": [rule]}, data=data)
    assert result.report.sites[0].conversion == "mla"
    kept = [{"sites": "*", "heads": [0], "to": "dense"}]
    assert convert(build("llama"), plan={"rules": kept}).report.sites[0].conversion == "dense"


def test_heads_that_do_not_exist_and_norms_that_tie_are_refused() -> None:
    rule = {**RULES[1], "heads": [1, 4]}
    with pytest.raises(RefusedError, match=r"self_attn[^\n]*heads \[4\][^\n]*4 KV groups"):
        convert(build("llama"), plan={"rules": [rule]})
    with pytest.raises(RefusedError, match="queries are normalised over all heads"):
        convert(zoo_models.build("olmo2"), plan={"rules": [{**RULES[1], "heads": [0]}]})


@pytest.mark.slow
def test_training_reaches_every_group() -> None:
    settings = {"tokens": 4000, "stages": ["layerwise", "end-to-end"], "seq_len": 20}
    plan = {"rules": RULES, "calibrate": settings}
    data = torch.randint(3, 97, (200, 20), generator=torch.Generator().manual_seed(1))
    trained = convert(build("llama"), plan=plan, data=data).model
    plan["calibrate"] = {**settings, "lr": 1e-12}
    plain = dict(convert(build("llama"), plan=plan, data=data).model.named_parameters())
    changed = {
        name.split("mixer.")[1]
        for name, p in trained.named_parameters()
        if "mixer." in name and float((p - plain[name]).detach().abs().max()) > 1e-6
    }
    assert {"groups.0.kv_b_proj.weight", "groups.1.k_proj.weight", "o_proj.weight"} <= changed


@pytest.mark.slow
def test_lora_reaches_the_groups() -> None:
    pytest.importorskip("peft")
    settings = {"tokens": 2000, "lora_rank": 2, "lr": 1e-2, "seq_len": 20}
    plan = {"rules": RULES, "calibrate": {**settings, "stages": ["layerwise"]}}
    data = torch.randint(3, 97, (100, 20), generator=torch.Generator().manual_seed(1))
    trained = convert(build("llama"), plan=plan, data=data).model
    plan["calibrate"] = {**settings, "stages": ["layerwise"], "lr": 1e-9}
    plain = dict(convert(build("llama"), plan=plan, data=data).model.named_parameters())
    name = "model.layers.0.self_attn.mixer.groups.0.kv_b_proj.weight"
    gap = dict(trained.named_parameters())[name] - plain[name]
    values = torch.linalg.svdvals(gap.double())
    assert values[0] > 0 and values[2:].sum() < 1e-3 * values.sum()


def test_the_forecast_knows_the_groups(results: Any) -> None:
    model = build("llama")
    plan = Plan.load({"rules": RULES})
    choices = choose(find_attention(model), plan)
    site = predict(model, choices, plan, made_up(model), rows=64).sites[0]
    assert site.conversion == "mixed"
    assert list(site.options["groups"]) == [
        {"heads": [0, 3], "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 8},
        {"heads": [1, 2], "to": "dense"},
    ]
    assert site.cache_bytes_after == 4 * CACHED
    mixer = results["llama"].model.model.layers[0].self_attn.mixer
    assert site.parameters_after == sum(p.numel() for p in mixer.parameters())


@pytest.mark.daily
@pytest.mark.parametrize(
    "name",
    ["qwen3", "gpt_neox", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_FAMILIES)],
)
def test_families(name: str) -> None:
    """q/k norms, partial rotary, interleaved and fused projections, biases, two masks."""
    model = zoo_models.build(name)
    exact = {"to": "mla", "allow_growth": True}
    core = find_attention(model).sites[0].spec.core
    rotary = {"qwen3": 8, "gpt_neox": 4, "gpt2": 0, "gemma3": 8, "phi3": 8}[name]
    exact |= {"qk_rope_head_dim": rotary, "fold": 1, "kv_lora_rank": 16 - rotary}
    last = core.kv_heads - 1
    ids = torch.randint(3, zoo_models.VOCABULARY, (4, 40))
    result = convert(model, plan={"rules": [{"sites": "*", "heads": [last], **exact}]}, data=ids)
    assert all(s.exactness == "exact" and len(s.groups) == 2 for s in result.report.sites)
    with torch.no_grad():
        expected, got = model(ids).logits, result.model(ids).logits
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()
    asked = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids[:1], **asked), result.model.generate(ids[:1], **asked))


def divided(model: Any, inputs: dict[str, Any] | None = None) -> Any:
    """Every site as two groups of unchanged heads, taken alternately (no plan asks for that)."""
    found = find_attention(model, inputs)
    choices = preflight(found, Plan.load("identity"))
    for choice in choices:
        heads = range(choice.config.core.kv_heads)
        parts = tuple(
            PartOptions(heads=tuple(heads[i::2]), to="dense", options=conversion("dense").Options())
            for i in (0, 1)
        )
        choice.conversion, choice.options = Mixed(), MixedOptions(groups=parts)
    return rewrite(model, choices, {}, capture=found.capture)


@pytest.mark.parametrize("name", ["t5", "bert", "vit"])
def test_dividing_a_block_changes_nothing(name: str) -> None:
    """Encoders, cross-attention and a bias that the first layer hands to the later ones."""
    model = zoo_models.build(name).double()
    done = divided(model)
    inputs = made_up(model)
    if name == "vit":
        inputs = {k: v.double() for k, v in inputs.items()}
    with torch.no_grad():
        expected, got = model(**inputs).logits, done.model(**inputs).logits
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    errors = block_errors(model, done.model, list(done.built), inputs)
    assert max(errors.values()) <= 1e-12
    if name == "t5":
        asked = {"max_new_tokens": 12, "do_sample": False}
        ids = inputs["input_ids"]
        assert torch.equal(model.generate(ids, **asked), done.model.generate(ids, **asked))


@pytest.mark.slow
def test_a_block_that_no_module_owns(tmp_path: Path) -> None:
    model = tower(InlinedBlock)
    ids = torch.randint(0, 50, (3, 11))
    exact = {"to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 8, "fold": 1, "allow_growth": True}
    plan = {"rules": [{"sites": "*", "heads": [0], **exact}]}
    result = convert(model, plan=plan, inputs={"ids": ids}, data=[{"ids": ids}])
    result.save(tmp_path / "out")
    again: Any = load(tmp_path / "out", model=tower(InlinedBlock), inputs={"ids": ids})
    with torch.no_grad():
        expected = model(ids)
        assert (result.model(ids=ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(again(ids=ids), result.model(ids=ids))
