"""GQA to MLA: exact where it promises to be, refused where it must be, absorbed == expanded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from mla_blocks import CASES, HIDDEN, PAPER, GrowingState, config, dense, moments
from torch import Tensor

from reattend.mixers.base import Context
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mla import MlaOptions, ToMla, resolve
from reattend.sharing import address


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_exact_setting_equals_the_original(case: str) -> None:
    original = dense(CASES[case])
    conversion = ToMla()
    options = conversion.exact_setting(original.config)
    assert conversion.check(original.config, options) is None
    built = conversion.build(original, moments(original), options)
    assert built.exactness == "exact"
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), built.mixer(x, Context())
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


VARIANTS: dict[str, dict[str, Any]] = {
    "published": PAPER,
    "real-global": {"mixing": "real", "latent": "pca"},
    "complex-global-one": {"mixing": "complex", "phase": "one"},
    "complex-per-frequency": {"mixing": "complex", "rope_select": "per-frequency"},
    "balanced-strided": {"rope_select": "per-frequency", "rope_table": "strided"},
    "per-head-svd": {
        "mixing": "none", "rope_select": "per-head", "latent": "svd", "balance": "none",
    },
    "care": {**PAPER, "latent": "care"},
    "derived-balance": {"balance": "derived"},
    "uncentred": {"center": False, "balance": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["gqa", "bias", "qk-norm-bias", "partial-rotary", "softcap"])
def test_every_option_is_exact_with_all_pairs_and_full_rank(case: str, variant: str) -> None:
    original = dense(CASES[case])
    exact = ToMla().exact_setting(original.config)
    options = MlaOptions(**{**exact.model_dump(exclude_unset=True), **VARIANTS[variant]})
    assert ToMla().check(original.config, options) is None
    built = ToMla().build(original, moments(original), options)
    assert built.exactness == "exact"
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), built.mixer(x, Context())
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("case", "chunk"), itertools.product(CASES, (1, 4)))
def test_absorbed_equals_expanded_through_a_cache(case: str, chunk: int) -> None:
    original = dense(CASES[case])
    cfg = original.config
    options = MlaOptions(kv_lora_rank=7, qk_rope_head_dim=cfg.rotary.pairs if cfg.rotary else 0)
    built: Any = ToMla().build(original, moments(original), options).mixer
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    built.form = "expanded"
    with torch.no_grad():
        expected = built(x, Context())
        built.form = "absorbed"
        whole = built(x, Context())
        state = GrowingState()
        steps = [built(x[:, i : i + chunk], Context(), state) for i in range(0, 12, chunk)]
    assert (whole - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert state.rows is not None
    held = sum(t.numel() for t in state.rows) // (2 * 12)
    assert held == built.cache_per_token == 7 + options.qk_rope_head_dim


def test_padding_is_hidden_in_both_forms() -> None:
    original = dense(config())
    built: Any = (
        ToMla()
        .build(original, moments(original), MlaOptions(kv_lora_rank=9, qk_rope_head_dim=4))
        .mixer
    )
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    valid = torch.ones(2, 12)
    valid[0, :4] = 0
    position = (valid.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        for form in ("expanded", "absorbed"):
            built.form = form
            padded = built(x, Context(mask=valid, position_BN=position))[0, 4:]
            alone = built(x[:1, 4:], Context())[0]
            assert (padded - alone).abs().max() <= 1e-12 * alone.abs().max()


def test_error_falls_as_the_rank_grows_and_vanishes() -> None:
    original = dense(config(4, 4))
    found, conversion = moments(original), ToMla()
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    errors = []
    with torch.no_grad():
        expected = original(x, Context())
        for rank in (2, 8, 16, 32):
            options = MlaOptions(kv_lora_rank=rank, qk_rope_head_dim=32, fold=1)
            y = conversion.build(original, found, options).mixer(x, Context())
            errors.append(float((y - expected).norm() / expected.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[-2]


def test_fold_two_is_not_exact_and_says_bounded() -> None:
    original = dense(config(4, 4))
    found = moments(original)
    options = MlaOptions(kv_lora_rank=32, qk_rope_head_dim=32, fold=2, allow_growth=True, **PAPER)
    built = ToMla().build(original, found, options)
    x = torch.randn(2, 13, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        gap = (built.mixer(x, Context()) - original(x, Context())).abs().max()
    assert built.exactness == "bounded"
    assert gap > 1e-3


@pytest.mark.parametrize("case", ["gqa", "bias", "q/k norm", "bias and q/k norm"])
def test_low_rank_queries_are_exact_at_full_rank(case: str) -> None:
    original = dense(config(bias="bias" in case, norm="norm" in case))
    exact = ToMla().exact_setting(original.config)
    options = exact.model_copy(update={"q_lora_rank": HIDDEN})
    built = ToMla().build(original, moments(original, queries=True), options)
    assert built.exactness == "bounded"  # depends on the rank of the data, so not promised
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        expected, got = original(x, Context()), built.mixer(x, Context())
    assert (got - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("norm", [False, True])
def test_a_lower_query_rank_costs_what_the_queries_lose(norm: bool) -> None:
    """Rank 12 of 24, a bias beside: the bias is kept whole, and fewer ranks lose more."""
    original = dense(config(bias=True, norm=norm))
    found, exact = moments(original, queries=True), ToMla().exact_setting(original.config)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    errors = []
    for rank in (6, 12, 18, 24):
        options = exact.model_copy(update={"q_lora_rank": rank, "phase": "one"})
        assert ToMla().check(original.config, options) is None
        mixer: Any = ToMla().build(original, found, options).mixer
        with torch.no_grad():
            errors.append(float((mixer(x, Context()) - original(x, Context())).norm()))
            zero = torch.zeros(1, 1, HIDDEN, dtype=torch.float64)
            rows = mixer.q_proj(zero).unflatten(-1, (4, -1))[..., :8].flatten()
        assert torch.allclose(rows, original.q_proj.bias, atol=1e-12)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 < errors[-2]


def test_latent_norm_keeps_the_mean_size() -> None:
    original = dense(config())
    options = MlaOptions(kv_lora_rank=12, qk_rope_head_dim=8, latent_norm="rms")
    built: Any = ToMla().build(original, moments(original), options).mixer
    plain: Any = (
        ToMla()
        .build(original, moments(original), options.model_copy(update={"latent_norm": "none"}))
        .mixer
    )
    x = torch.randn(4, 50, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        ratio = built._rows(x, built._turn(Context(), None, x))[0].norm() / (
            plain._rows(x, plain._turn(Context(), None, x))[0].norm()
        )
    assert 0.9 < float(ratio) < 1.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (MlaOptions(), "no size given"),
        (MlaOptions(kv_lora_rank=8, kv_keep=0.5), "give one"),
        (MlaOptions(kv_lora_rank=25, qk_rope_head_dim=8), "larger than possible"),
        (MlaOptions(kv_lora_rank=24, qk_rope_head_dim=8, fold=1), "would not shrink: 24 + 8 = 32"),
        (MlaOptions(kv_lora_rank=8, qk_rope_head_dim=7), "must be even"),
        (MlaOptions(kv_lora_rank=8, qk_rope_head_dim=6, fold=2, **PAPER), "cannot be spread"),
        (MlaOptions(kv_keep=0.01), "leaves no latent"),
    ],
)
def test_impossible_sizes_are_refused_with_the_arithmetic(options: MlaOptions, words: str) -> None:
    refusal = ToMla().check(config(), options)
    assert isinstance(refusal, Refusal)
    assert words in refusal.reason


def test_growth_can_be_allowed() -> None:
    options = MlaOptions(kv_lora_rank=24, qk_rope_head_dim=8, fold=1, allow_growth=True)
    assert ToMla().check(config(), options) is None


def test_softcap_with_a_key_bias_is_refused() -> None:
    refusal = ToMla().check(config(bias=True, softcap=5.0), MlaOptions(kv_keep=0.5))
    assert isinstance(refusal, Refusal)
    assert "softcap" in refusal.reason


def test_kv_keep_counts_the_rotary_part() -> None:
    sizes = resolve(config(8, 4), MlaOptions(kv_keep=0.5))
    assert not isinstance(sizes, Refusal)
    assert sizes.kv_lora_rank + sizes.qk_rope_head_dim == 32


def test_predicted_cost_is_what_is_built() -> None:
    original = dense(config(bias=True))
    options = MlaOptions(kv_lora_rank=7, qk_rope_head_dim=4)
    cost = ToMla().cost(original.config, options)
    built = ToMla().build(original, moments(original), options).mixer
    assert cost.cache == built.cache_per_token == 11
    assert cost.parameters == sum(p.numel() for p in built.parameters())


def test_up_projection_is_read_through_the_layer() -> None:
    """An unmerged LoRA on kv_b_proj counts in both forms, and its updates are seen."""

    class Lora(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = torch.nn.Parameter(torch.randn(2, base.in_features, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.randn(base.out_features, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + x @ self.a.t() @ self.b.t()

    original = dense(config())
    built: Any = (
        ToMla()
        .build(original, moments(original), MlaOptions(kv_lora_rank=9, qk_rope_head_dim=4))
        .mixer
    )
    built.kv_b_proj = Lora(built.kv_b_proj)
    x = torch.randn(2, 12, HIDDEN, dtype=torch.float64)
    for _ in range(2):
        with torch.no_grad():
            built.form = "expanded"
            expected = built(x, Context())
            built.form = "absorbed"
            got = built(x, Context())
            assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
            built.kv_b_proj.b.mul_(1.5)


@pytest.mark.parametrize("norm", [False, True])
def test_what_stays_as_it_was_is_not_copied(norm) -> None:
    """The output projection, and before a key norm every projection; `cost` knows how much."""
    block = dense(config(norm=norm))
    options = MlaOptions(kv_lora_rank=5, qk_rope_head_dim=4)
    mixer = ToMla().build(block, moments(block), options).mixer
    old = {address(tensor) for tensor in block.parameters()}
    shared = {name: p.numel() for name, p in mixer.named_parameters() if address(p) in old}
    assert "o_proj.weight" in shared
    assert len(shared) == (6 if norm else 1)
    new = mixer.o_proj.bias.numel()  # the values' mean
    assert ToMla().cost(block.config, options).kept == sum(shared.values()) + new
