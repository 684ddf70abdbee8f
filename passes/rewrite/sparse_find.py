"""How heads get their patterns: the finder that the options name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reattend.mixers.dense import DenseConfig
from reattend.passes.rewrite.base import TRAINING_TRIALS, Conversion, Measure, Subject
from reattend.passes.rewrite.sparse_alpha import alphas, best
from reattend.passes.rewrite.sparse_instant import CALLS, instant
from reattend.passes.rewrite.sparse_profile import profile
from reattend.passes.rewrite.sparse_retrieval import ROWS, retrieval
from reattend.passes.rewrite.sparse_search import search

#: Plans that `profile` runs for its last choice; how many there are shows only then.
PLANS = 8


def find(conversion: Conversion, sites: list[Subject], measure: Measure) -> list[Any]:
    """Options for every site, with nothing left to choose."""
    options = sites[0].options
    if options.finder == "search":
        return search(conversion, sites, measure)
    if options.finder == "profile":
        return profile(conversion, sites, measure)
    plain = type(options)(
        pattern=options.pattern, evict=options.evict, density_at=options.density_at
    )
    if options.finder == "alpha":
        made: Any = {s.path: conversion.build(s.dense, s.statistics, plain).mixer for s in sites}
        scores = alphas(made, measure, options.steps)
    else:
        scores = (retrieval if options.finder == "retrieval" else instant)(sites, measure)
    full = best(sites, scores, options.keep_full)
    return [plain.model_copy(update={"heads_full": heads}) for heads in full]


def trials(configs: Sequence[DenseConfig], options: Any) -> int:
    """Runs of the model on a few rows that the finder takes."""
    if options.finder == "search":
        patterns = len([p for p in options.candidates or (options.pattern,) if not p.full])
        return patterns * sum(config.core.kv_heads for config in configs)
    look = options.profile
    found: dict[str, int] = {
        "alpha": TRAINING_TRIALS * options.steps,
        "instant": TRAINING_TRIALS * CALLS,
        "retrieval": ROWS,
        "profile": look.samples * (len(look.lengths) + PLANS),
    }
    return found[options.finder]
