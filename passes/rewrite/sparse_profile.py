"""MoA's way to give every KV head an elastic window: influence, a program of integers, a trial.

Fu et al., arXiv 2406.14909. What every head costs with every rule is predicted from first-order
influences at several lengths (`sparse_influence`); the plans that no other beats at every length
are found under one density (`sparse_solve`); the last word has a run of each on longer rows. What
differs: influences are measured at the length of that last run too, where MoA stops short of it and
a window as wide as its longest text looks as good as everything; the answers are the model's own on
the second half of text that repeats itself, where MoA has it answer questions about several
documents; a window counts by the query's own position and in tokens, not in blocks
(`reattend.patterns.terms.Window`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pydantic import Field

from reattend.errors import PlanError
from reattend.mixers.config import Frozen
from reattend.passes.rewrite.base import Conversion, Measure, Subject
from reattend.passes.rewrite.sparse_influence import influences, predicted
from reattend.passes.rewrite.sparse_solve import Plan, Problem
from reattend.passes.rewrite.sparse_watch import answering
from reattend.patterns.pattern import HeadPattern

#: tokens per side of a tile: at most this, and at least `TILES` to the shortest length
BLOCK, TILES = 64, 32
#: a window grows by 0, 1/8, ... 1 token per token
SLOPES = 8


class ProfileOptions(Frozen):
    """How `finder: profile` looks and chooses; MoA's numbers.

    Attributes:
        lengths: tokens of the rows that influences are measured on. Where the calibration rows are
            no longer than the longest, as many lengths are spread evenly below theirs.
        choose_at: tokens of the rows that the plans are run on for the last choice; influences are
            measured there as well.
        sinks: first tokens that every rule of the grid keeps.
        samples: rows at each length.
        max_rules: different rules in one block, for kernels that want few (MoA: 2).
    """

    lengths: tuple[int, ...] = Field(default=(2048, 4096, 8192), min_length=1)
    choose_at: int = Field(default=12_288, gt=1)
    sinks: int = Field(default=64, ge=0)
    samples: int = Field(default=32, gt=0)
    max_rules: int | None = Field(default=None, gt=0)

    def fitted(self, rows: int) -> tuple[tuple[int, ...], int]:
        """Lengths to profile and the longer one to choose at, for calibration rows of a length."""
        longest = min(self.choose_at, rows)
        if max(self.lengths) < longest:
            return self.lengths, longest
        parts = len(self.lengths) + 1
        return tuple(rows * n // parts for n in range(1, parts)), rows


def grid(lengths: tuple[int, ...], sinks: int) -> tuple[HeadPattern, ...]:
    """MoA's rules: windows a + b N, a in steps of half the shortest length, b of an eighth.

    Left out: wider than the longest length, or empty at the shortest.
    """
    low, high = min(lengths), max(lengths)
    found = [HeadPattern(full=True)]
    for a in range(-low, high + 1, max(1, low // 2)):
        for eighths in range(SLOPES + 1):
            b = eighths / SLOPES
            if a + b * high > high or a + b * low <= 0 or (a >= 0 and b == 1):
                continue
            found.append(HeadPattern(sinks=sinks, window=a, window_slope=b))
    return tuple(found)


def profile(conversion: Conversion, sites: list[Subject], measure: Measure) -> list[Any]:
    """Options for every site: a pattern for each KV head, with what the report says of the choice.

    Raises:
        PlanError: no causal language model, rows too short, or no plan keeps to the density.
        MissingExtraError: SciPy is not installed.
    """
    options = sites[0].options
    wanted: ProfileOptions = options.profile
    lengths, last = wanted.fitted(measure.length)
    if min(lengths) < 2 * TILES:
        raise PlanError(
            f"rows of {measure.length} tokens are too short for finder: profile",
            where="to: sparse",
            why=f"the shortest length to look at would be {min(lengths)}; {2 * TILES} are needed",
            next_step="raise calibrate.seq_len, or give more text (data sampled from the model "
            "itself is short)",
        )
    lengths = (*lengths, last)
    rules = options.candidates or grid(lengths, wanted.sinks)
    problem = _problem(sites, measure, rules, lengths, options)
    plans = problem.pareto()
    if not plans:
        least = zip(lengths, problem.size_LHC.min(2).mean(1), strict=True)
        raise PlanError(
            f"no plan reaches kv_density {options.kv_density}",
            where="to: sparse",
            why="the smallest rules hold "
            + ", ".join(f"{share:.1%} of {n}" for n, share in least)
            + " tokens",
            next_step="fewer profile.sinks, longer calibrate.seq_len, or a larger kv_density",
        )
    losses = [_tried(conversion, sites, measure, rules, plan, last) for plan in plans]
    chosen = plans[int(np.argmin(losses))]
    published = ", ".join(map(str, wanted.lengths))
    fits = (
        ""
        if lengths[:-1] == wanted.lengths
        else f" ({published} do not fit rows of {measure.length})"
    )
    words = (
        f"profiled at {', '.join(map(str, lengths))} tokens{fits}; best of {len(plans)} plans at "
        f"{last}; gap to the bound at most {max(plan.gap for plan in plans):.2%}"
    )
    return [
        s.options.decided(found).model_copy(update={"chosen": words})
        for s, found in zip(sites, _by_site(sites, rules, chosen), strict=True)
    ]


def _problem(
    sites: list[Subject],
    measure: Measure,
    rules: tuple[HeadPattern, ...],
    lengths: tuple[int, ...],
    options: Any,
) -> Problem:
    """Predicted losses and sizes of every head with every rule."""
    block = max(1, min(BLOCK, min(lengths) // TILES))
    cores = [s.dense.config.core for s in sites]
    loss = []
    for n in lengths:
        worth = influences(sites, measure, n, options.profile.samples, block)
        heads = [
            torch.stack([predicted(worth[s.path], p, core, n, block) for p in rules], 1)
            for s, core in zip(sites, cores, strict=True)
        ]
        loss.append(torch.cat(heads).numpy())
    sizes = [
        [[p.reads(n, core) / n for p in rules] for core in cores for _ in range(core.kv_heads)]
        for n in lengths
    ]
    each = [c.qk_head_dim + c.v_head_dim for c in cores for _ in range(c.kv_heads)]
    site = [n for n, c in enumerate(cores) for _ in range(c.kv_heads)]
    return Problem(
        np.stack(loss), np.array(sizes), np.array(each, dtype=float), np.array(site),
        options.kv_density, options.profile.max_rules,
    )  # fmt: skip


def _by_site(
    sites: list[Subject], rules: tuple[HeadPattern, ...], plan: Plan
) -> list[dict[int, HeadPattern]]:
    """A plan's patterns by KV head, for each site."""
    left = iter(plan.rule_H)
    return [{h: rules[next(left)] for h in range(s.dense.config.core.kv_heads)} for s in sites]


def _tried(
    conversion: Conversion,
    sites: list[Subject],
    measure: Measure,
    rules: tuple[HeadPattern, ...],
    plan: Plan,
    length: int,
) -> float:
    """The loss of the model with all heads of a plan, on rows of a length it was not made on."""
    mixers = {
        s.path: conversion.build(s.dense, None, s.options.decided(found)).mixer
        for s, found in zip(sites, _by_site(sites, rules, plan), strict=True)
    }
    rows = sites[0].options.profile.samples
    told = answering("finder: profile", sites, measure, mixers, length, rows)
    with told as runs, torch.no_grad():
        return float(np.mean([float(run.loss) for run in runs]))
