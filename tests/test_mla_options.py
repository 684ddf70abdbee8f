"""Options: what contradicts itself is refused with the reason, lists are per layer."""

from __future__ import annotations

import pytest
from mla_blocks import PAPER, config, dense
from pydantic import ValidationError

from reattend.errors import ArgumentError
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mla import MlaOptions, ToMla, resolve
from reattend.plan import Plan
from reattend.plans import preset_names
from reattend.statistics import SiteStatistics


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_table": "strided"}, "fixes them"),
        ({"fold": 2}, "published selection"),
        ({"rope_select": "per-head"}, "mixing: none"),
        ({"mixing": "none"}, "does not go with"),
        ({"balance": "none"}, "no meaning"),
        ({"balance": 0.0}, "greater than or equal"),
        ({"balance": 1e300}, "less than or equal"),
        ({"balance": float("inf")}, "less than or equal"),
        ({"kv_lora_rank": "most"}, "kv_lora_rank"),
    ],
)
def test_contradictions_are_named(options, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        MlaOptions(kv_keep=0.5, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_lora_rank": "auto"}, "set kv_keep"),
        ({"kv_keep": 0.5, "kv_lora_rank": "auto", "qk_rope_head_dim": "auto",
          "allocate": "energy"}, "shares ranks"),
        ({"kv_keep": 0.5, "qk_rope_head_dim": 6, "rope_select": "per-frequency"}, "divide one"),
        ({"kv_keep": 0.5, "qk_rope_head_dim": 6, "mixing": "none", "rope_select": "per-head"},
         "as many pairs in each"),
        ({"kv_keep": 0.5, "qk_rope_head_dim": 12, "mixing": "none", "rope_select": "mean-key"},
         "at most 8"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(options, words: str) -> None:
    refusal = ToMla().check(config(), MlaOptions(**options))
    assert isinstance(refusal, Refusal)
    assert words in refusal.reason


def test_what_the_maths_does_not_allow_is_refused() -> None:
    mean_key = MlaOptions(kv_keep=0.5, mixing="none", rope_select="mean-key")
    assert "partial rotary" in ToMla().check(config(pairs=2), mean_key).reason


def test_lists_have_one_entry_per_layer() -> None:
    options = MlaOptions(kv_lora_rank=(8, 4, 2), qk_rope_head_dim=(4, 4, 2))
    chosen = [ToMla().for_layer(options, layer, 3) for layer in range(3)]
    assert [(c.kv_lora_rank, c.qk_rope_head_dim) for c in chosen] == [(8, 4), (4, 4), (2, 2)]
    refusal = ToMla().for_layer(options, 0, 4)
    assert "lists 3 layers, the stack has 4" in refusal.reason


def test_only_what_is_read_is_collected() -> None:
    wants = ToMla().wants
    assert wants(config(), MlaOptions(kv_keep=0.5, **PAPER)) == {"gram"}
    assert "attention" in wants(config(), MlaOptions(kv_keep=0.5))
    care = MlaOptions(kv_keep=0.5, **{**PAPER, "latent": "care"})
    assert wants(config(), care) == {"gram", "inputs"}
    auto = MlaOptions(kv_keep=0.5, kv_lora_rank="auto")
    assert "sample" in wants(config(), auto)


def any_size(name: str) -> bool:
    """Whether a preset converts to MLA of sizes that follow the model."""
    rule = Plan.load(name).rules[0]
    return rule.to == "mla" and not name.startswith("mla-")


@pytest.mark.parametrize("name", sorted(filter(any_size, preset_names())))
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_presets_fit_ordinary_blocks(name: str, keep: float) -> None:
    options = Plan.load(name).rules[0].options.model_copy(update={"kv_keep": keep})
    for cfg in (config(4, 4), config(8, 4, bias=True)):
        assert ToMla().check(cfg, options) is None


def test_statistics_of_another_plan_are_refused() -> None:
    mixer = dense(config())
    found = SiteStatistics.empty(mixer)
    with pytest.raises(ArgumentError, match="not collected: attention"):
        ToMla().build(mixer, found, MlaOptions(kv_keep=0.5))


def test_a_number_for_the_rank_settles_the_width() -> None:
    options = MlaOptions(kv_lora_rank=8, qk_rope_head_dim="auto")
    assert not options.automatic
    assert resolve(config(), options) == resolve(config(), MlaOptions(kv_lora_rank=8))
