"""One budget: the knapsack against every combination, and curves that are what they measure."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from mla_blocks import PAPER, config, dense, moments

from reattend.passes.rewrite.base import Subject
from reattend.passes.rewrite.knapsack import Curve, knapsack
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.mla_budget import allocate, by_energy, curve
from reattend.passes.rewrite.mla_error import RATIOS, SHRINKAGES, Sample, best_solution
from reattend.passes.rewrite.mla_sizes import resolve

AUTO: dict[str, Any] = {"kv_lora_rank": "auto", "qk_rope_head_dim": "auto"}


def subject(options: MlaOptions, path: str = "a", seed: int = 3, size: float = 1.0) -> Subject:
    mixer = dense(config(4, 4))
    torch.manual_seed(seed)
    for parameter in mixer.parameters():
        parameter.data = size * 0.4 * torch.randn_like(parameter)
    return Subject(path, mixer, moments(mixer), options)


def random_curves(seed: int) -> list[Curve]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(3):
        sizes = sorted(rng.choice(np.arange(1, 9), 5, replace=False).tolist())
        error = np.full(max(sizes) + 1, np.inf)
        error[sizes] = rng.random(5)
        made.append(Curve(error, {s: (0, s) for s in sizes}))
    return made


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_the_best_of_all_combinations(seed: int) -> None:
    curves = random_curves(seed)
    for budget in (12, 15, 19):
        fits = [c for c in itertools.product(*(k.sizes for k in curves)) if sum(c) <= budget]
        if not fits:
            continue
        best = min(fits, key=lambda c: sum(k.error[s] for k, s in zip(curves, c, strict=True)))
        assert [r for _, r in knapsack(curves, budget)] == list(best)


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_the_budget_is_kept_and_goes_where_it_matters(keep: float) -> None:
    options = MlaOptions(kv_keep=keep, **AUTO)
    sites = [subject(options, "loud"), subject(options, "quiet")]
    found = allocate(sites, lambda path, mixer: 1.0 if path == "loud" else 1e-6)
    used = [o.kv_lora_rank + o.qk_rope_head_dim for o in found]
    assert sum(used) <= 2 * int(keep * 64)
    assert used[0] > used[1]
    assert not any(o.automatic for o in found)
    for site, chosen in zip(sites, found, strict=True):
        assert ToMla().check(site.dense.config, chosen) is None
        built = ToMla().build(site.dense, site.statistics, chosen).mixer
        assert built.cache_per_token == chosen.kv_lora_rank + chosen.qk_rope_head_dim


def test_a_curve_is_the_measured_error_at_the_ranks_it_measured() -> None:
    options = MlaOptions(kv_keep=0.5, **AUTO)
    site = subject(options)
    even = resolve(site.dense.config, options)
    one = curve(site, even, lambda path, mixer: 1.0)
    rank, sample = 16, Sample(site.dense, site.statistics.samples)  # 0.5 of the even share
    size = next(s for s, (_, r) in one.sizes.items() if r == rank)
    rope = one.sizes[size][0]
    fixed = MlaOptions(kv_lora_rank=rank, qk_rope_head_dim=rope)
    error = sample.error(ToMla().build(site.dense, site.statistics, fixed).mixer)
    base = MlaOptions(kv_lora_rank=even.kv_lora_rank, qk_rope_head_dim=even.qk_rope_head_dim)
    weight = 1 / sample.error(ToMla().build(site.dense, site.statistics, base).mixer)
    assert one.error[size] == pytest.approx(weight * error, rel=1e-6)


def test_a_fixed_rotary_width_stays() -> None:
    options = MlaOptions(kv_keep=0.5, kv_lora_rank="auto", qk_rope_head_dim=8)
    sites = [subject(options, "a"), subject(options, "b", seed=5)]
    assert {o.qk_rope_head_dim for o in allocate(sites, lambda p, m: 1.0)} == {8}


def test_a_wide_rotary_part_leaves_what_rank_it_leaves() -> None:
    """Here 1 of an even share of 33, less than any rank a curve is measured at."""
    block = dense(config(4, 4, width=16, v_width=2, pairs=8))
    options = MlaOptions(kv_keep=0.47, kv_lora_rank="auto", qk_rope_head_dim=32)
    sites = [Subject(path, block, moments(block), options) for path in "ab"]
    assert [o.kv_lora_rank for o in allocate(sites, lambda p, m: 1.0)] == [1, 1]


def test_published_selections_only_get_widths_they_can_take() -> None:
    options = MlaOptions(kv_keep=0.5, **AUTO, **PAPER)
    for chosen in allocate([subject(options), subject(options, "b")], lambda p, m: 1.0):
        assert not hasattr(resolve(config(4, 4), chosen), "reason")


def test_equal_energy_gives_more_rank_to_the_flatter_spectrum() -> None:
    options = MlaOptions(
        kv_keep=0.25, kv_lora_rank="auto", allocate="energy", latent="svd", balance="none",
        qk_rope_head_dim=8, center=False,
    )  # fmt: skip
    flat, steep = subject(options, "flat"), subject(options, "steep")
    for name in ("k_proj", "v_proj"):
        layer = getattr(steep.dense, name)
        layer.weight.data = layer.weight.data * torch.logspace(0, -6, 24).double()
    even = [resolve(s.dense.config, options) for s in (flat, steep)]
    (_, more), (_, less) = by_energy([flat, steep], even, 32)
    assert more > less
    assert more + less + 16 <= 32


def test_energy_is_shared_at_the_balance_that_derived_starts_from() -> None:
    given: dict[str, Any] = {"kv_keep": 0.25, "kv_lora_rank": "auto", "allocate": "energy"}
    ranks = []
    for balance in (1.0, "derived"):
        options = MlaOptions(**given, balance=balance)
        plain, loud = subject(options, "a"), subject(options, "b")
        loud.dense.k_proj.weight.data[:16] *= 8
        sites = [plain, Subject("b", loud.dense, moments(loud.dense), options)]
        even = [resolve(s.dense.config, options) for s in sites]
        ranks.append(by_energy(sites, even, 32))
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(
    ("name", "choices", "more"),
    [
        ("balance", RATIOS, {}),
        ("shrinkage", SHRINKAGES, {"latent": "care", "center": False}),
    ],
)
def test_what_is_derived_is_the_best_that_was_tried(
    name: str, choices: tuple[float, ...], more: dict[str, Any]
) -> None:
    options = MlaOptions(kv_lora_rank=12, qk_rope_head_dim=8, **{name: "derived"}, **more)
    site = subject(options)
    sizes = resolve(site.dense.config, options)
    found, _ = best_solution(site.dense, site.statistics, options, sizes)
    sample = Sample(site.dense, site.statistics.samples)
    errors = {}
    for tried in choices:
        fixed = options.model_copy(update={name: tried})
        errors[tried] = sample.error(ToMla().build(site.dense, site.statistics, fixed).mixer)
    assert errors[getattr(found, name)] == min(errors.values())
    assert len(set(errors.values())) == len(choices)
    chosen = sample.error(ToMla().build(site.dense, site.statistics, options).mixer)
    assert chosen == min(errors.values())


def test_without_a_measure_errors_are_relative_to_the_output() -> None:
    options = MlaOptions(kv_keep=0.5, **AUTO)
    site = subject(options)
    even = resolve(site.dense.config, options)
    absolute = curve(site, even, lambda path, mixer: 1.0)
    relative = curve(site, even, lambda path, mixer: None)
    sample = Sample(site.dense, site.statistics.samples)
    base = MlaOptions(kv_lora_rank=even.kv_lora_rank, qk_rope_head_dim=even.qk_rope_head_dim)
    error = sample.error(ToMla().build(site.dense, site.statistics, base).mixer)
    assert relative.sizes == absolute.sizes
    finite = np.isfinite(relative.error)
    ratio = relative.error[finite] / absolute.error[finite]
    assert np.allclose(ratio, error / sample.size())
