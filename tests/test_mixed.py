"""Head groups of different kinds in one block: exact, one cache, saved, and refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from test_mla import CASES, HIDDEN, GrowingState, config, dense, moments
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    StaticCache,
)

from reattend import Report, convert, find_attention, load
from reattend.errors import RefusedError, UnsupportedCacheError
from reattend.mixers.base import Context, Mixer, build_mixer
from reattend.mixers.config import NormConfig, RelativeConfig, StreamConfig
from reattend.mixers.dense import DenseAttention
from reattend.mixers.mixed import GroupConfig, MixedAttention, MixedConfig, runs
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mixed import Mixed, MixedOptions, PartOptions
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.registry import conversion

# four KV groups of two query heads, taken apart so that no group's heads are neighbours only
APART = ((0, 3), (1,), (2,))


def options(original: DenseAttention, exact: bool = True) -> MixedOptions:
    """Groups 0 and 3 to one latent, 1 to another, 2 stays."""
    made = []
    for heads in APART:
        part_of = original.config.model_copy(
            update={
                "core": original.config.core.model_copy(
                    update={"heads": 2 * len(heads), "kv_heads": len(heads)}
                )
            }
        )
        if heads == (2,):
            made.append(PartOptions(heads=heads, to="dense", options=conversion("dense").Options()))
            continue
        chosen = ToMla().exact_setting(part_of)
        if not exact:
            rope = 2 if original.config.rotary else 0
            chosen = MlaOptions(kv_lora_rank=6 * len(heads), qk_rope_head_dim=rope)
        made.append(PartOptions(heads=heads, to="mla", options=chosen))
    return MixedOptions(groups=tuple(made))


def wide(case: str) -> Any:
    """A case of test_mla with eight heads in four KV groups."""
    found = CASES[case]
    core = found.core.model_copy(update={"heads": 8, "kv_heads": 4})
    return found.model_copy(update={"core": core})


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_exact_parts_equal_the_original(case: str) -> None:
    original = dense(wide(case))
    chosen = options(original)
    assert Mixed().check(original.config, chosen) is None
    built = Mixed().build(original, moments(original), chosen)
    assert built.exactness == "exact"
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), built.mixer(x, Context())
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("case", ["gqa", "bias", "qk-norm", "no-rotary", "window", "v-width"])
def test_packed_rows_give_what_one_pass_gives(case: str, chunk: int) -> None:
    original = dense(wide(case))
    mixer = Mixed().build(original, moments(original), options(original, exact=False)).mixer
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    state = GrowingState()
    with torch.no_grad():
        expected = mixer(x, Context())
        steps = [mixer(x[:, i : i + chunk], Context(), state) for i in range(0, 12, chunk)]
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.rows is not None
    held = sum(t.numel() for t in state.rows) // (2 * 12)
    core = original.config.core
    rope = 4 if original.config.rotary else 0
    assert held == mixer.cache_per_token == 18 + rope + core.qk_head_dim + core.v_head_dim
    assert held < original.cache_per_token


def test_a_state_that_keeps_groups_apart_is_not_packed() -> None:
    class Apart(GrowingState):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [GrowingState() for _ in APART]

        def group(self, index: int) -> GrowingState:
            return self.parts[index]

        def seen(self) -> int:
            return self.parts[0].seen()

    original = dense(wide("gqa"))
    mixer = Mixed().build(original, moments(original), options(original, exact=False)).mixer
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    state = Apart()
    with torch.no_grad():
        expected = mixer(x, Context())
        steps = [mixer(x[:, i : i + 3], Context(), state) for i in range(0, 12, 3)]
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.rows is None
    shapes = [[tuple(t.shape) for t in part.rows or ()] for part in state.parts]
    assert shapes == [
        [(2, 1, 12, 12), (2, 1, 12, 2)], [(2, 1, 12, 6), (2, 1, 12, 2)],
        [(2, 1, 12, 8), (2, 1, 12, 8)],
    ]  # fmt: skip


def test_a_group_with_its_own_state_needs_a_state_of_groups() -> None:
    class Recurrent(DenseAttention):
        def store(self, new: Any, state: Any) -> Any:
            return new

    original = dense(wide("gqa"))
    mixer: Any = Mixed().build(original, moments(original), options(original)).mixer
    mixer.groups[2] = Recurrent(mixer.groups[2].config).double()
    x = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    with pytest.raises(UnsupportedCacheError, match="state of its own"):
        mixer(x, Context(), GrowingState())


def relative_pair() -> tuple[DenseAttention, Mixer]:
    plain = wide("no-rotary")
    bias = RelativeConfig(buckets=(0, 0, 1, 2, 2), rows=3)
    original = dense(plain.model_copy(update={"relative": bias}))
    parts = tuple(
        PartOptions(heads=h, to="dense", options=conversion("dense").Options()) for h in APART
    )
    return original, Mixed().build(original, None, MixedOptions(groups=parts)).mixer


def test_a_relative_bias_goes_with_its_heads() -> None:
    original, mixer = relative_pair()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), mixer(x, Context())
        state = GrowingState()
        steps = [mixer(x[:, i : i + 3], Context(), state) for i in range(0, 9, 3)]
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert mixer.adds_bias and original.adds_bias
    ours, theirs = mixer.score_bias(4, 9, 5), original.score_bias(4, 9, 5)
    assert ours is not None and theirs is not None
    assert torch.equal(ours, theirs)


def test_a_mask_per_head_is_divided_among_the_groups() -> None:
    original = dense(wide("gqa"))
    mixer = Mixed().build(original, moments(original), options(original)).mixer
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    mask = (torch.rand(2, 8, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    with torch.no_grad():
        expected, got = original(x, Context(mask=mask)), mixer(x, Context(mask=mask))
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_cross_attention_reads_what_it_stored() -> None:
    class Memory(GrowingState):
        def stored(self) -> tuple[Tensor, Tensor] | None:
            return self.rows

    plain = wide("no-rotary")
    core = plain.core.model_copy(update={"pattern": "full"})
    original = dense(plain.model_copy(update={"memory_size": HIDDEN, "core": core}))
    parts = tuple(
        PartOptions(heads=h, to="dense", options=conversion("dense").Options()) for h in APART
    )
    mixer = Mixed().build(original, None, MixedOptions(groups=parts)).mixer
    x, memory = (torch.randn(2, n, HIDDEN, dtype=torch.float64) for n in (5, 7))
    state = Memory()
    with torch.no_grad():
        expected = original(x, Context(), None, memory)
        first = mixer(x[:, :2], Context(), state, memory)
        rest = mixer(x[:, 2:], Context(), state, None)
    assert (torch.cat([first, rest], 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.seen() == 7


def test_what_a_checkpoint_stores_builds_the_same_block() -> None:
    original = dense(wide("bias"))
    mixer = Mixed().build(original, moments(original), options(original)).mixer
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict(), strict=True)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(again(x, Context()), mixer(x, Context()))


@pytest.mark.parametrize("heads", [((0,), (0, 1)), ((0,), (2,)), ((),)])
def test_groups_carry_every_head_once(heads: Any) -> None:
    groups = tuple(GroupConfig(kv_heads=h, kind="dense", config={}) for h in heads)
    with pytest.raises(ValidationError, match="exactly once"):
        MixedConfig(groups=groups, out_features=None)


def test_runs() -> None:
    assert runs((0, 1, 2)) == [(0, 3)]
    assert runs((3, 1, 2, 5)) == [(0, 1), (1, 2), (3, 1)]


def test_predicted_cost_is_what_is_built() -> None:
    original = dense(wide("bias"))
    chosen = options(original, exact=False)
    cost = Mixed().cost(original.config, chosen)
    built = Mixed().build(original, moments(original), chosen)
    assert cost.cache == built.mixer.cache_per_token
    assert cost.parameters == sum(p.numel() for p in built.mixer.parameters())


def test_refusals_name_the_heads() -> None:
    original = dense(wide("gqa"))
    parts = list(options(original).groups)
    parts[0] = parts[0].model_copy(update={"options": MlaOptions(kv_lora_rank=99)})
    refusal = Mixed().check(original.config, MixedOptions(groups=tuple(parts)))
    assert isinstance(refusal, Refusal)
    assert "heads [0, 3] (to: mla): kv_lora_rank 99 is larger than possible: 2 kv" in refusal.reason


def test_a_norm_over_all_heads_cannot_be_divided() -> None:
    norm = NormConfig(kind="rms", scope="full", eps=1e-6)
    tied = config(8, 4).model_copy(update={"k": StreamConfig(norm=norm)})
    refusal = Mixed().check(tied, options(dense(wide("gqa"))))
    assert isinstance(refusal, Refusal)
    assert "keys are normalised over all heads at once" in refusal.reason


# ---- whole models ---------------------------------------------------------------------------

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, sliding_window=8, query_pre_attn_scalar=8)
    ),
}
RULES = [
    {"sites": "*", "heads": [1], "to": "keep"},
    {"sites": "*", "heads": [0, 3], "to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 8},
]
#: numbers cached per token and layer: the latent of two heads, and two heads as they were
CACHED = 10 + 8 + 2 * 16


def build(name: str) -> Any:
    torch.manual_seed(5)
    model = MODELS[name]().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = torch.randint(3, 97, (8, 40))
    return {n: convert(build(n), plan={"rules": RULES}, data=data) for n in MODELS}


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 7)):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return ids, mask


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
    torch.manual_seed(0)
    tied = Olmo2ForCausalLM(Olmo2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"}))
    with pytest.raises(RefusedError, match="normalised over all heads"):
        convert(tied.eval(), plan={"rules": RULES})


def test_training_reaches_every_group(results: Any) -> None:
    plan = {
        "rules": RULES,
        "calibrate": {"tokens": 4000, "stages": ["layerwise", "end-to-end"], "seq_len": 20},
    }
    data = torch.randint(3, 97, (200, 20), generator=torch.Generator().manual_seed(1))
    trained = convert(build("llama"), plan=plan, data=data).model
    plain = dict(results["llama"].model.named_parameters())
    changed = {
        name.split("mixer.")[1]
        for name, p in trained.named_parameters()
        if "mixer." in name and not torch.equal(p, plain[name])
    }
    assert {"groups.0.kv_b_proj.weight", "groups.1.k_proj.weight", "o_proj.weight"} <= changed
