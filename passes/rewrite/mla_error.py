"""Output error of a converted block on the sampled rows, and what is chosen by it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from reattend.mixers.base import Context, Mixer
from reattend.mixers.dense import DenseAttention
from reattend.mixers.latent import LatentAttention
from reattend.passes.rewrite.mla_latent import LatentChoice
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_sizes import Sizes
from reattend.passes.rewrite.mla_solve import Solved, assemble, solve
from reattend.statistics import SiteStatistics

#: Ratios that `balance: derived` tries.
RATIOS = (0.5, 0.7, 1.0, 1.4, 2.0)
#: What `shrinkage: derived` tries.
SHRINKAGES = (0.01, 0.0, 0.003, 0.03, 0.1, 0.3)


class Sample:
    """The block's outputs on the rows its statistics kept; inputs are the original's own."""

    def __init__(self, dense: DenseAttention, rows: list[Tensor]) -> None:
        like = dense.k_proj.weight
        self.rows = [row.to(like.device, like.dtype)[None] for row in rows]
        with torch.no_grad():
            self.expected: list[Tensor] = [dense(x, Context()).double() for x in self.rows]

    def size(self) -> float:
        """Mean over tokens of |expected|^2."""
        tokens = sum(y.shape[1] for y in self.expected)
        return sum(float(y.square().sum()) for y in self.expected) / max(tokens, 1)

    def error(self, mixer: Mixer) -> float:
        """Mean over tokens of |output - expected|^2."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for x, expected in zip(self.rows, self.expected, strict=True):
                total += float((mixer(x, Context()).double() - expected).square().sum())
                tokens += x.shape[1]
        return total / max(tokens, 1)


def best_solution(
    dense: DenseAttention, statistics: SiteStatistics, options: MlaOptions, sizes: Sizes
) -> tuple[MlaOptions, Solved]:
    """The balance and shrinkage, where they are `derived`, with the least output error on the
    sample; and the solution.
    """
    assert statistics.samples
    sample = Sample(dense, statistics.samples)
    ratios = RATIOS if options.balance == "derived" else (options.balance,)
    shrinkages = SHRINKAGES if options.shrinkage == "derived" else (options.shrinkage,)
    if options.latent != "care":
        shrinkages = shrinkages[:1]
    best: tuple[float, MlaOptions, Solved] | None = None
    for balance, shrinkage in itertools.product(ratios, shrinkages):
        tried = options.model_copy(update={"balance": balance, "shrinkage": shrinkage})
        solved = solve(dense, statistics, tried, sizes)
        mixer, _ = assemble(dense, statistics, tried, sizes, solved)
        error = sample.error(mixer)
        if best is None or error < best[0]:  # one solution at a time: they are large
            best = error, tried, solved
    assert best is not None
    return best[1:]


def best_norm(
    dense: DenseAttention,
    statistics: SiteStatistics,
    options: MlaOptions,
    sizes: Sizes,
    solved: Solved,
) -> tuple[LatentAttention, LatentChoice]:
    """A latent under a norm, with ballast or with one more row of its own (`mla_norm`)."""
    assert statistics.samples
    sample = Sample(dense, statistics.samples)
    tried = [assemble(dense, statistics, options, sizes, solved, b) for b in (True, False)]
    return min(tried, key=lambda made: sample.error(made[0]))
