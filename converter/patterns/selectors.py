"""Selectors: the part of a pattern that is chosen while the model runs, from queries and keys.

What one does is in `reattend.mixers.selecting`, a file per kind; here is what plan files write.
A query sees (what the pattern's terms show ∪ what is selected ∪ itself) ∩ the block's own pattern
∩ real tokens; the last two hold before anything is ranked. No selector is KV-monotone: a later
query may choose any key again, so caches keep every row.

Layout letters: d key head width, N queries, M keys, G key/value heads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from reattend.mixers.config import CoreConfig
from reattend.patterns.learned import Gate, LowRank, Segments, Values
from reattend.patterns.routing import Blocks, Observed
from reattend.patterns.selector import Budgeted, Phase, Selector

__all__ = [
    "AnySelector", "Blocks", "Channels", "Gate", "LowRank", "Observed", "Recorded", "Segments",
    "Values", "VerticalSlash",
]  # fmt: skip


class VerticalSlash(Selector):
    """Columns and diagonals that the last queries of a prompt look at (MInference, 2407.02490).

    Jiang et al., arXiv 2407.02490, as released: the probabilities of the last `last_queries`
    queries are summed by key and by distance; the best `columns` keys and `slashes` distances are
    read by every query. The first `first_columns` and the last `last_slashes` are always among
    them. Decoding is dense.

    Attributes:
        columns: keys that every query reads.
        slashes: distances at which every query reads a key.
        last_queries: queries at the end of a prompt whose probabilities are summed.
        first_columns: keys at the start that are always among the columns.
        last_slashes: shortest distances that are always among the slashes.
    """

    kind: Literal["vertical-slash"]
    columns: int = Field(default=1000, gt=0)
    slashes: int = Field(default=6096, gt=0)
    last_queries: int = Field(default=64, gt=0)
    first_columns: int = Field(default=30, ge=0)
    last_slashes: int = Field(default=100, ge=0)

    @property
    def acts(self) -> Phase:
        """One estimate for a prompt."""
        return "prefill"

    def reads(self, length: int) -> int:
        """Columns and diagonals, as if none crossed."""
        return min(length, self.columns + self.slashes)

    def covers(self, length: int) -> bool:
        """As many columns, or diagonals, as there are."""
        return max(self.columns, self.slashes) >= length

    def sized(self, length: int) -> dict[str, Any]:
        """An eighth of the columns and of the diagonals."""
        return dict.fromkeys(("columns", "slashes"), max(1, length // 8))

    def misfit(self, core: CoreConfig) -> str | None:
        """Diagonals look back."""
        return None if core.causal else "select: vertical-slash needs a causal block"


class Channels(Budgeted):
    """Tokens by a product over a few channels of queries and keys (Double Sparsity).

    Yang et al., arXiv 2408.07092: the channels where |query x key| of one token is largest on
    average, found once per KV head on calibration data. The cache holds those channels of every
    key side by side, the labels; the best tokens are gathered. Prompts are read densely.

    Attributes:
        share: of the key width that labels have, one channel at least.
        phase: `both`: prompts too, which meet every key and save nothing; then results do not
            depend on how a text is cut, and quality in one pass is that of decoding.
    """

    kind: Literal["channels"]
    share: float = Field(default=1 / 16, gt=0.0, le=1.0)
    phase: Literal["decode", "both"] = "decode"

    @property
    def acts(self) -> Phase:
        """See `phase`."""
        return self.phase

    @property
    def calibrated(self) -> bool:
        """Which channels."""
        return True

    def width(self, core: CoreConfig) -> int:
        """Channels of a label."""
        return max(1, round(self.share * core.qk_head_dim))

    def reads(self, length: int) -> int:
        """Tokens of the budget."""
        return self.units(length)

    def stored(self, core: CoreConfig) -> float:
        """Labels."""
        return self.width(core)

    def work(self, length: int, core: CoreConfig) -> float:
        """A product with every label."""
        return length * self.width(core)

    def misfit(self, core: CoreConfig) -> str | None:
        """It acts while decoding."""
        return None if core.causal else "select: channels needs a causal block"


class Recorded(Selector):
    """The best tokens of one layer, read by the layers behind it (TidalDecode).

    Yang et al., arXiv 2410.05076: the layers before the first of `at` are dense; those of `at`
    attend to every key, and note each head's `topk` best tokens; every other layer reads what the
    last of them noted. Prompts are read densely, caches keep every row.

    Attributes:
        at: numbers of the layers that note, from 0.
        topk: tokens per query head.
        layer: the layer this is for; not for plans.
    """

    kind: Literal["recorded"]
    at: tuple[NonNegativeInt, ...] = Field(min_length=1)
    topk: int = Field(default=256, gt=0)
    layer: int | None = Field(default=None, ge=0)

    def at_layer(self, layer: int) -> Recorded:
        """Where it is, unless that is known."""
        return self if self.layer is not None else self.model_copy(update={"layer": layer})

    @property
    def source(self) -> int | None:
        """The layer whose notes are read; None: every key is read."""
        if self.layer is None or self.layer in self.at:
            return None
        return max((n for n in self.at if n < self.layer), default=None)

    @property
    def acts(self) -> Phase:
        """Only single tokens are decoded from notes."""
        return "decode"

    def reads(self, length: int) -> int:
        """All keys, or the noted ones."""
        return length if self.source is None else min(length, self.topk)

    def covers(self, length: int) -> bool:
        """As many tokens as there are; layers that read everything belong to those that do not."""
        return self.topk >= length

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the tokens."""
        return {"topk": max(1, length // 4)}

    def work(self, length: int, core: CoreConfig) -> float:
        """A layer that notes forms its scores once more."""
        return length * core.qk_head_dim if self.layer in self.at else 0.0

    def misfit(self, core: CoreConfig) -> str | None:
        """It acts while decoding, along a stack of layers."""
        if not core.causal:
            return "select: recorded needs a causal block"
        if self.layer is None:
            return "select: recorded is for a stack of layers, in the `pattern` of all heads"
        return None


AnySelector = Annotated[
    VerticalSlash | Blocks | Observed | Channels | Gate | Segments | Values | LowRank | Recorded,
    Field(discriminator="kind"),
]
