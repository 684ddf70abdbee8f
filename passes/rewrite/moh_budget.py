"""`top_k: auto`: heads where they count, few where they do not; the same share over all layers.

What a layer may leave out differs: the first may need every head for every token where the second
does well with a third of them. So every layer is run with fewer and fewer of its heads, the others
as they were, and what the model's output moves by is measured: a divergence, or a squared
difference where there are no logits. The counts are then the exact minimum of the sum under the
budget, by dynamic programming. Ours; Jin et al. (arXiv 2410.11842) vary budgets by stage, by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from reattend.errors import PlanError
from reattend.mixers.routed import RoutedAttention
from reattend.passes.rewrite.base import Measure
from reattend.passes.rewrite.knapsack import Curve, knapsack
from reattend.passes.rewrite.moh_options import Heads, MohOptions

#: counts of a layer that are measured, at most
TRIED = 8


def tried(heads: Heads) -> list[int]:
    """Numbers of routed units that are measured: fewer than all."""
    spaced = {1, *(-(-heads.routed * i // TRIED) for i in range(1, TRIED))}
    return sorted(spaced - {heads.routed, 0})


def spread(
    mixers: Sequence[tuple[str, RoutedAttention]], options: MohOptions, measure: Measure
) -> list[int]:
    """`top_k` of every block.

    Args:
        mixers: by site path, with routers at their start.
        options: of all; `active` of their heads together are used.
        measure: what the model loses.

    Raises:
        PlanError: the model cannot run with one of its blocks replaced.
    """
    curves, whole = [], 0
    for path, mixer in mixers:
        c = mixer.config
        whole += c.core.heads
        sizes = {c.core.heads: (0.0, c.routed)}
        for k in tried(Heads(c.units, c.shared, c.routed)):
            mixer.router.k = k
            lost = measure(path, mixer)
            if lost is None:
                raise PlanError(
                    "top_k: auto needs a model that can run with one of its blocks replaced",
                    where=path,
                    next_step="give top_k as a count, or a list with one per layer",
                )
            sizes[(c.shared + k) * c.heads_per_unit] = (lost, k)
        curves.append(Curve.of(sizes))
    assert options.active is not None
    return knapsack(curves, int(options.active * whole + 1e-9))
