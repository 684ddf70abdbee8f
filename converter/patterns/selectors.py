"""Selectors: the part of a pattern that is chosen while the model runs, from queries and keys.

What one does is in `reattend.mixers.selecting`, a file per kind; here is what plan files write.
A query sees (what the pattern's terms show ∪ what is selected ∪ itself) ∩ the block's own pattern
∩ real tokens; the last two hold before anything is ranked. No selector is KV-monotone: a later
query may choose any key again, so caches keep every row.

Layout letters: d key head width, N queries, M keys, G key/value heads.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import Field, model_validator

from reattend.mixers.config import CoreConfig
from reattend.mixers.selecting.memo import ROLLBACK
from reattend.patterns.learned import Gate, LowRank, Segments, Values
from reattend.patterns.selector import Budgeted, Phase, Selector


class VerticalSlash(Selector):
    """Columns and diagonals that the last queries of a prompt look at (MInference, 2407.02490).

    Jiang et al., arXiv 2407.02490, as released: the probabilities of the last `last_queries`
    queries are summed by key and by distance; the best `columns` keys and `slashes` distances are
    read by every query. The first `first_columns` and the last `last_slashes` are always among
    them. Decoding is dense.
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

    def misfit(self, core: CoreConfig) -> str | None:
        """Diagonals look back."""
        return None if core.causal else "select: vertical-slash needs a causal block"


class Blocks(Budgeted):
    """Blocks of keys by the score of their mean key; a causal query's own block is always chosen.

    `queries: each` routes every query by itself: MoBA (Lu et al., arXiv 2502.13189), in prefill
    and in decoding, where the cache holds the mean keys of whole blocks. `queries: pooled` routes
    blocks of queries by their mean: MInference's block-sparse heads (arXiv 2407.02490), and
    DraftAttention (arXiv 2505.14708) or BiFormer (arXiv 2303.08810) where the block is not causal;
    decoding is dense then. `key: attended`, with the first block and the last two always chosen, is
    LongHeads (Lu et al., arXiv 2402.10685).

    Attributes:
        block: tokens per block. Units of the budget are blocks, the own one included.
        queries: what is routed.
        key: what stands for a block: its mean key, or for every query head the keys that its mean
            output looks at, and then the query without its position.
        first, last: blocks at the start, and up to the own one, that are always chosen, and count.
        tile: places along every axis of a grid of image or video tokens; these are then the blocks.
            Text sees and is seen, and does not count. For blocks that are not causal.
        shape, text_before, text_after: where the grid lies, as `reattend.patterns.grids.Grid`; an
            open shape is taken from a plan's `image_grid`.
        across: whether each row of the map has the budget, or all of a head's together (VMoBA,
            arXiv 2506.23858).
    """

    kind: Literal["blocks"]
    block: int = Field(default=64, gt=0)
    queries: Literal["each", "pooled"] = "each"
    key: Literal["mean", "attended"] = "mean"
    first: int = Field(default=0, ge=0)
    last: int = Field(default=1, gt=0)
    tile: tuple[int, ...] = Field(default=(), max_length=3)
    shape: tuple[int, ...] = ()
    text_before: int = Field(default=0, ge=0)
    text_after: int | None = Field(default=None, ge=0)
    across: Literal["row", "head"] = "row"

    @model_validator(mode="after")
    def _tiles_fit(self) -> Blocks:
        if self.shape and (
            len(self.shape) != len(self.tile)
            or any(t < 1 or n % t for t, n in zip(self.tile, self.shape, strict=True))
        ):
            raise ValueError(f"tile {self.tile} does not divide the grid {self.shape}")
        if self.tile and (self.key != "mean" or self.first or self.last > 1):
            raise ValueError("key, first and last are for blocks in a row, not for tiles")
        if self.key == "attended" and self.queries == "pooled":
            raise ValueError("key: attended is compared with single queries: queries: each")
        if self.topk is not None and self.topk < self.first + self.last:
            raise ValueError(f"topk {self.topk} is less than first + last, which are always chosen")
        return self

    @property
    def acts(self) -> Phase:
        """Pooled queries are those of a prompt."""
        return "both" if self.queries == "each" else "prefill"

    @property
    def size(self) -> int:
        """Tokens per block."""
        return prod(self.tile) if self.tile else self.block

    def reads(self, length: int) -> int:
        """Blocks of the budget, whole."""
        many = -(-length // self.size)
        sure = 0 if self.tile else min(many, self.first + self.last)
        return min(length, max(sure, self.units(many)) * self.size)

    def stored(self, core: CoreConfig) -> float:
        """What stands for blocks, where decoding asks for it."""
        if self.acts != "both" or not core.causal:
            return 0.0
        heads = core.heads // core.kv_heads if self.key == "attended" else 1
        return heads * core.qk_head_dim / self.size

    def held(self, core: CoreConfig) -> float:
        """Queries of the last block, until it is whole; of some more, in case tokens go back."""
        if self.key == "mean" or self.acts != "both":
            return 0.0
        return (self.block + ROLLBACK) * core.qk_head_dim * core.heads / core.kv_heads

    def work(self, length: int, core: CoreConfig) -> float:
        """A product with what stands for every block; once per block, its making."""
        if self.acts != "both":
            return 0.0
        making = (2 * self.block + 3) * core.qk_head_dim if self.key == "attended" else 0
        return core.qk_head_dim * length / self.size + making

    def misfit(self, core: CoreConfig) -> str | None:
        """Grids and budgets for a whole head look ahead; attended keys are of complete blocks."""
        if self.key == "attended" and not core.causal:
            return "select: blocks with key: attended needs a causal block"
        if self.key == "attended" and core.qk_head_dim != core.v_head_dim:
            return (
                "select: blocks with key: attended multiplies outputs with keys, and their widths "
                f"are {core.v_head_dim} and {core.qk_head_dim}"
            )
        if core.causal and (self.tile or self.across == "head"):
            return "select: blocks with a tile or across: head looks ahead, the block is causal"
        if self.tile and not self.shape:
            return "select: blocks has a tile and no grid: give image_grid, for example [14, 14]"
        return None


class Observed(Budgeted):
    """Blocks by the attention of one pass that saw everything, kept for the passes behind it.

    SparseD, Wang et al., arXiv 2509.24014, for diffusion language models, which fill in a text in
    many passes: the first see every key; in the last of those every head's probabilities are summed
    over blocks of queries and keys, and each block of queries keeps its best blocks, of the prompt
    and of what is filled in apart. `reattend.denoising` says which passes belong together; a pass
    by itself finds its own map and reads it at once.

    Attributes:
        block: tokens per block. Units of the budget are blocks.
        skip: share of the passes that see everything.
    """

    kind: Literal["observed"]
    block: int = Field(default=128, gt=0)
    skip: float = Field(default=0.2, ge=0.0, lt=1.0)

    def reads(self, length: int) -> int:
        """Blocks of the budget, whole."""
        return min(length, self.units(-(-length // self.block)) * self.block)

    def misfit(self, core: CoreConfig) -> str | None:
        """A causal block has no passes over one text."""
        return "select: observed is for blocks that are not causal" if core.causal else None


class Channels(Budgeted):
    """Tokens by a product over a few channels of queries and keys (Double Sparsity).

    Yang et al., arXiv 2408.07092: the channels where |query x key| of one token is largest on
    average, found once per KV head on calibration data. The cache holds those channels of every
    key side by side, the labels; the best tokens are gathered. Prompts are read densely.

    Attributes:
        share: of the key width that labels have, one channel at least.
        phase: `both`: prompts too, under a mask, where nothing is saved; then results do not
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
        layer: the layer this is for; a plan leaves it out.
    """

    kind: Literal["recorded"]
    at: tuple[int, ...] = Field(min_length=1)
    topk: int = Field(default=256, gt=0)
    layer: int | None = Field(default=None, ge=0)

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
