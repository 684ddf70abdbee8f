"""`auto` sizes: one budget for all sites, docs/math/mla.md section 7.

For every site the output error is measured on its sample at a few (R, r), interpolated between
ranks, and weighted by what the site's error does to the model's output (`measure`, one run per
site; without it, errors are relative to the output's size). The sizes are then the exact minimum
of the sum under the budget, by dynamic programming.
"""

from __future__ import annotations

import copy

import numpy as np
import torch

from reattend.mixers.dense import DenseAttention
from reattend.mixers.latent import LatentAttention
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Measure, Subject
from reattend.passes.rewrite.knapsack import Curve, knapsack
from reattend.passes.rewrite.mla_error import Sample
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_sizes import Sizes, full_rank, resolve
from reattend.passes.rewrite.mla_solve import assemble, solve

#: Rotary widths tried per site: this many steps up to an even share of the budget.
STEPS = 16
#: Ranks measured per rotary width, as shares of an even share of the budget.
RANKS = (0.0625, 0.125, 0.25, 0.5, 0.8, 1.2, 1.8, 2.5)


def allocate(sites: list[Subject], measure: Measure) -> list[MlaOptions]:
    """Final sizes of sites that share options and a budget.

    Args:
        sites: with their statistics; `options.kv_keep` is the share of all their caches.
        measure: see `Measure`.
    """
    options: MlaOptions = sites[0].options
    if not options.automatic:
        return [site.options for site in sites]
    even = [_even(site) for site in sites]
    budget = sum(s.kv_lora_rank + s.qk_rope_head_dim for s in even)
    if options.allocate == "energy":
        chosen = by_energy(sites, even, budget)
    else:
        curves = [curve(s, e, measure) for s, e in zip(sites, even, strict=True)]
        chosen = knapsack(curves, budget)
    return [
        site.options.model_copy(
            update={"qk_rope_head_dim": rope, "kv_lora_rank": rank, "kv_keep": None}
        )
        for site, (rope, rank) in zip(sites, chosen, strict=True)
    ]


def curve(site: Subject, even: Sizes, measure: Measure) -> Curve[tuple[int, int]]:
    """The weighted error of one site by cache size."""
    assert site.statistics.samples
    dense = _wide(site.dense)
    sample, options = Sample(dense, site.statistics.samples), site.options
    share = even.kv_lora_rank + even.qk_rope_head_dim
    cap = dense.config.cache_per_token - 1
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    mixer = _built(dense, site, even)
    moved = measure(site.path, mixer)
    weight = 1 / max(sample.size(), 1e-30)
    if moved is not None:
        weight = max(moved, 1e-12) / max(sample.error(mixer), 1e-30)
    for rope in _widths(site, share):
        sizes = _sizes(site, rope, 1)
        if sizes is None:
            continue
        most = min(full_rank(dense.config, options, rope), cap - rope)
        if most < 1:
            continue
        shares = [max(1, round(share * x)) for x in RANKS]
        if rope == options.qk_rope_head_dim:  # beside a wide one, all of RANKS may be too many
            shares.append(even.kv_lora_rank)
        ranks = sorted({min(r, most) for r in shares})
        solved = solve(dense, site.statistics, options, sizes)
        errors = []
        for rank in ranks:
            at = sizes.model_copy(update={"kv_lora_rank": rank})
            errors.append(sample.error(assemble(dense, site.statistics, options, at, solved)[0]))
        floor = 1e-12 * max(errors) + 1e-300
        fine = np.arange(ranks[0], ranks[-1] + 1)
        logs = np.interp(fine, ranks, np.log(np.maximum(errors, floor)))
        for rank, error in zip(fine.tolist(), np.exp(logs).tolist(), strict=True):
            if error < best.get(rope + rank, (np.inf, None))[0]:
                best[rope + rank] = (error, (rope, rank))
    return Curve.of({size: (weight * e, widths) for size, (e, widths) in best.items()})


def by_energy(sites: list[Subject], even: list[Sizes], budget: int) -> list[tuple[int, int]]:
    """X-EcoMLA's dynamic rank: in every site the smallest rank that keeps the same energy share."""
    kept = []
    for site, sizes in zip(sites, even, strict=True):
        options = site.options
        energy = solve(site.dense, site.statistics, options, sizes).latent.energy
        kept.append(np.cumsum(energy))
    left = budget - sum(s.qk_rope_head_dim for s in even)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        if sum(_ranks_for(kept, share)) <= left:
            low = share
        else:
            high = share
    ranks = _ranks_for(kept, low)
    return [(s.qk_rope_head_dim, r) for s, r in zip(even, ranks, strict=True)]


def _ranks_for(kept: list[np.ndarray], share: float) -> list[int]:
    return [min(int(np.searchsorted(k, share)) + 1, len(k)) for k in kept]


def _even(site: Subject) -> Sizes:
    sizes = resolve(site.dense.config, site.options)
    assert not isinstance(sizes, Refusal)
    return sizes


def _sizes(site: Subject, rope: int, rank: int) -> Sizes | None:
    """R as it would be used, or None where the selection cannot take it."""
    update = {"qk_rope_head_dim": rope, "kv_lora_rank": rank, "kv_keep": None}
    sizes = resolve(site.dense.config, site.options.model_copy(update=update))
    return None if isinstance(sizes, Refusal) else sizes


def _widths(site: Subject, share: int) -> list[int]:
    """Rotary widths to try."""
    config, asked = site.dense.config, site.options.qk_rope_head_dim
    if isinstance(asked, int):
        return [asked]
    most = 2 * config.rotary.pairs * config.core.kv_heads if config.rotary else 0
    step = max(2, 2 * round(share / (2 * STEPS)))
    widths = {0, *range(step, share + 1, step), *(w for w in (2,) if share < 64)}
    return sorted(w for w in widths if w <= most)


def _built(dense: DenseAttention, site: Subject, sizes: Sizes) -> LatentAttention:
    solved = solve(dense, site.statistics, site.options, sizes)
    return assemble(dense, site.statistics, site.options, sizes, solved)[0]


def _wide(dense: DenseAttention) -> DenseAttention:
    """In at least float32, so that rounding to a half type does not count as error."""
    if dense.k_proj.weight.dtype in (torch.float32, torch.float64):
        return dense
    return copy.deepcopy(dense).float()
