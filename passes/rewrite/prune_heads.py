"""`to: prune-heads`: the least important heads are taken out, for good.

What is left is an ordinary block with fewer heads. Either whole KV groups go, with the query heads
that read them and their share of the cache, or query heads do, as many in every group, which leaves
the cache as it is (unequal groups would be no grouped-query attention). Scores as Minitron's, or by
what each head adds to the output (`importance`); the published advice is to distil afterwards, and
to take no more than a quarter at a time. Exact with `keep: 1.0`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.parts import kept_heads, query_heads
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Cost, dense_cost
from reattend.passes.rewrite.moh_options import PerLayer, Score, count
from reattend.passes.rewrite.per_layer import at_layer
from reattend.passes.rewrite.ranking import Ranking


class PruneOptions(Frozen):
    """Which heads stay.

    Attributes:
        keep: KV groups that stay, or query heads: a count, a share of all (rounded up), or a list
            with one of these per layer of the stack.
        prune: whole `kv-groups`, or query `heads`, equally many of every group.
        importance: how heads are ranked (`passes/rewrite/importance.py`).
        order: KV groups, or query heads, by importance, where they have been measured; not for
            plans.
    """

    keep: PerLayer = 0.75
    prune: Literal["kv-groups", "heads"] = "kv-groups"
    importance: Score = "output-norm"
    order: tuple[int, ...] = Field(default=())


class ToPruneHeads(Ranking):
    """Any block whose heads can be told apart to one with fewer."""

    name = "prune-heads"
    Options = PruneOptions

    def check(self, config: DenseConfig, options: PruneOptions) -> Refusal | None:
        """Reads no weight."""
        units, core = self.units(config, options), config.core
        kept = self.kept(config, options)
        what = "query heads" if options.prune == "heads" else "KV groups"
        if not 0 < kept <= units:
            return Refusal(f"keep {kept} of {units} {what}: at least 1 and at most all must stay")
        if options.prune == "heads" and kept % core.kv_heads:
            return Refusal(
                f"{kept} query heads cannot be shared evenly by {core.kv_heads} KV groups, as "
                "grouped-query attention needs; give a multiple, or prune: kv-groups"
            )
        if isinstance(options.keep, float) and options.keep < 1 and kept == units:
            return Refusal(
                f"keep: {options.keep} of {units} {what} is all of them, so nothing would be pruned"
            )
        if kept == units:
            return None
        why = self.unranked(config, options)
        return None if why is None else Refusal(f"heads cannot be taken out: {why}")

    def for_layer(self, options: PruneOptions, layer: int, layers: int) -> PruneOptions | Refusal:
        """One entry of a per-layer list."""
        chosen = at_layer(options, ("keep",), layer, layers)
        return Refusal(chosen) if isinstance(chosen, str) else chosen

    def measures(self, options: PruneOptions) -> bool:
        """Unless all heads stay."""
        return options.keep != 1.0 or isinstance(options.keep, int)

    def units(self, config: DenseConfig, options: PruneOptions) -> int:
        """Query heads or KV groups."""
        return config.core.heads if options.prune == "heads" else config.core.kv_heads

    def kept(self, config: DenseConfig, options: PruneOptions) -> int:
        """How many stay."""
        step = config.core.kv_heads if options.prune == "heads" else 1
        return count(options.keep, self.units(config, options), step)

    def outcome(self, config: DenseConfig, options: PruneOptions) -> DenseConfig:
        """A block with fewer heads; which ones does not show, but in ALiBi's slopes."""
        kept, core = self.kept(config, options), config.core
        groups = core.kv_heads if options.prune == "heads" else kept
        heads = kept if options.prune == "heads" else kept * (core.heads // core.kv_heads)
        fewer = core.model_copy(update={"heads": heads, "kv_heads": groups})
        slopes = None if config.alibi is None else config.alibi[:heads]
        return config.model_copy(update={"core": fewer, "alibi": slopes})

    def exact_setting(self, config: DenseConfig) -> PruneOptions:
        """Everything stays."""
        return PruneOptions(keep=1.0)

    def cost(self, config: DenseConfig, options: PruneOptions) -> Cost:
        """That of the smaller block."""
        return dense_cost(self.outcome(config, options))

    def build(self, dense: DenseAttention, statistics: Any, options: PruneOptions) -> Built:
        """Rows and columns of the heads that stay, in the order they had."""
        core, kept = dense.config.core, self.kept(dense.config, options)
        units = self.units(dense.config, options)
        if kept == units:
            return Built(dense, "exact", {"kept": f"{units} of {units}"})
        order = self.order(dense, statistics, options)
        if options.prune == "heads":
            groups, heads = list(range(core.kv_heads)), balanced(order, core.kv_heads, kept)
            told = ", ".join(map(str, heads))
        else:
            groups = sorted(order[:kept])
            heads, told = query_heads(core, groups), ", ".join(map(str, groups))
        mixer = kept_heads(dense, groups, heads)
        return Built(mixer, "learned", {"kept": f"{kept} of {units}", options.prune: told})


def balanced(order: tuple[int, ...], groups: int, kept: int) -> list[int]:
    """The best heads of every KV group, equally many, in their own order."""
    each = len(order) // groups
    found: list[int] = []
    for group in range(groups):
        own = [head for head in order if head // each == group]
        found += sorted(own[: kept // groups])
    return found
