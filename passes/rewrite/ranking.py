"""What conversions share that keep the heads which matter: how importance is measured, and when.

Scores of one block are taken where it is built, from rows of its input; those of the whole model
are taken before, by `allocate`, and reach `build` as `order` in the options.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.parts import why_whole
from reattend.passes.rewrite.base import TRAINING_TRIALS, Conversion, Measure, Subject
from reattend.passes.rewrite.importance import LOCAL, ROWS, first_order, leave_one_out, ranked
from reattend.passes.rewrite.repeats import repeated
from reattend.statistics import Need


class Ranking(Conversion):
    """A conversion whose options have `importance` and `order`."""

    @abstractmethod
    def measures(self, options: Any) -> bool:
        """Whether these options ask which heads matter."""

    @abstractmethod
    def units(self, config: DenseConfig, options: Any) -> int:
        """What is ranked: query heads, or KV groups."""

    def unranked(self, config: DenseConfig, options: Any) -> str | None:
        """Why the heads of a block cannot be ranked and told apart, or None."""
        why = why_whole(config) or self.unread(config)
        if why is None and config.out_features is None:
            why = "the block has no output projection of its own that could follow their order"
        return why

    def unread(self, config: DenseConfig) -> str | None:
        """Why a block does not run on rows of its input alone, or None."""
        if config.cross:
            return "importance is measured on the block's own input, and its keys come from another"
        if config.core.pattern == "opaque":
            return "importance is measured without the model, and the mask is the model's own"
        return None

    def wants(self, config: DenseConfig, options: Any) -> frozenset[Need]:
        """Rows of the block's input, where heads are measured."""
        asked = self.measures(options) and not options.order
        return frozenset({"gram", "sample"}) if asked else frozenset()

    def undecided(self, options: Any) -> bool:
        """Whether the whole model is asked which heads matter."""
        return self.measures(options) and options.importance not in LOCAL and not options.order

    def solves(self, options: Any) -> int:
        """Never: heads are measured on rows."""
        return 0

    def learns(self, options: Any) -> bool:
        """Gates of all heads, for their gradients."""
        return options.importance == "first-order" and self.undecided(options)

    def trials(self, configs: Sequence[DenseConfig], options: Any) -> int:
        """One per unit, or gradients on a few rows."""
        if options.importance == "first-order":
            return ROWS * TRAINING_TRIALS
        return sum(self.units(config, options) for config in configs)

    def rehearsal(self, batch: dict[str, Any], options: Any) -> dict[str, Any]:
        """Text that repeats itself: heads that look things up show it."""
        return repeated(batch)

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """The order of every site's units."""
        units = {s.path: self.units(s.dense.config, s.options) for s in sites}
        if sites[0].options.importance == "first-order":
            scores = first_order(sites, measure, self.name)
        else:
            scores = leave_one_out(sites, measure, units)
        return [
            s.options.model_copy(update={"order": ranked(scores[s.path], units[s.path])})
            for s in sites
        ]

    def order(self, dense: DenseAttention, statistics: Any, options: Any) -> tuple[int, ...]:
        """Units from the most to the least important; as they are where nothing is measured."""
        units = self.units(dense.config, options)
        if options.order:
            return tuple(options.order)
        if not self.measures(options):
            return tuple(range(units))
        return ranked(LOCAL[options.importance](dense, statistics.samples), units)
