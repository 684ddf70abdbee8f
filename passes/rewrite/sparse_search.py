"""What each KV head needs: it is made sparse alone, and the model's output is compared.

The rows are calibration text whose second half repeats its first (`repeats`), so that heads which
look things up show it: perplexity of plain text hardly moves without them (DuoAttention, Xiao et
al., arXiv 2410.10819; retrieval heads, Wu et al., arXiv 2404.15574). No gradient and no label is
needed. The divergences of single heads are added up as if they were independent, and the sum is
minimised exactly under one budget for all sites.
"""

from __future__ import annotations

from math import inf
from typing import Any

from reattend.errors import PlanError
from reattend.mixers.config import CoreConfig
from reattend.passes.rewrite.base import Conversion, Measure, Subject
from reattend.passes.rewrite.knapsack import Curve, knapsack
from reattend.patterns.pattern import HeadPattern

#: what every key of a head costs, when candidates share a budget
STEPS = 64


def search(conversion: Conversion, sites: list[Subject], measure: Measure) -> list[Any]:
    """Options for every site: a pattern for each KV head, the least loss at the size asked for.

    Raises:
        PlanError: no divergence can be measured, the patterns hide nothing in rows this short, or
            even the smallest are too large.
    """
    options = sites[0].options
    heads = [(n, h) for n, s in enumerate(sites) for h in range(s.dense.config.core.kv_heads)]
    sizes = _sizes(options, sites[0].dense.config.core)
    moved = {
        place: {p: _moved(conversion, sites[place[0]], place[1], p, measure) for p in sizes}
        for place in heads
    }
    if max(value for each in moved.values() for value in each.values()) <= 0:
        raise PlanError(
            "the heads cannot be told apart: the patterns hide nothing in the calibration rows",
            where="to: sparse",
            next_step="raise calibrate.seq_len to more than twice the window, or narrow the window",
        )
    curves = []
    for place in heads:
        best: dict[int, tuple[float, HeadPattern]] = {}
        for pattern, size in sizes.items():
            if moved[place][pattern] < best.get(size, (inf, None))[0]:
                best[size] = (moved[place][pattern], pattern)
        curves.append(Curve.of(best))
    share, whole = (
        (options.keep_full, 1) if options.candidates == () else (options.kv_density, STEPS)
    )
    budget = int(share * len(heads) * whole + 0.5)
    try:
        chosen = knapsack(curves, budget)
    except ValueError as error:
        raise PlanError(
            f"no candidate is small enough for kv_density {share}",
            where="to: sparse",
            why=str(error),
            next_step="add a narrower candidate, or raise kv_density",
        ) from error
    by_site: list[dict[int, HeadPattern]] = [{} for _ in sites]
    for (number, head), pattern in zip(heads, chosen, strict=True):
        by_site[number][head] = pattern
    return [s.options.decided(found) for s, found in zip(sites, by_site, strict=True)]


def _sizes(options: Any, core: CoreConfig) -> dict[HeadPattern, int]:
    """What every candidate costs: its share of the keys at `density_at` tokens, in `STEPS`.

    For `keep_full` heads are counted, not keys.
    """
    full = HeadPattern(full=True)
    if options.keep_full is not None:
        return {options.pattern: 0, full: 1}
    causal = core.model_copy(update={"pattern": "causal", "window": 0, "chunk": 0})
    step = options.density_at / STEPS
    return {
        p: max(1, round(p.reads(options.density_at, causal) / step)) for p in options.candidates
    }


def _moved(
    conversion: Conversion, site: Subject, head: int, pattern: HeadPattern, measure: Measure
) -> float:
    """How far the model's output moves when only this head has this pattern."""
    if pattern.full:
        return 0.0
    full = HeadPattern(full=True)
    heads = range(site.dense.config.core.kv_heads)
    options = site.options.decided({h: pattern if h == head else full for h in heads})
    moved = measure(site.path, conversion.build(site.dense, site.statistics, options).mixer)
    if moved is None:
        raise PlanError(
            "choosing heads needs a model that can run with one of its blocks replaced",
            where=site.path,
            next_step="name the heads that stay in heads_full, or their patterns in head_patterns",
        )
    return moved
