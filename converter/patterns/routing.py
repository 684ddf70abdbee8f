"""Selectors of blocks that nothing is trained for: by what stands for a block, or what was seen.

Layout letters: d key head width, G key/value heads.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from pydantic import Field, model_validator

from reattend.mixers.config import CoreConfig
from reattend.mixers.selecting.memo import ROLLBACK
from reattend.patterns.selector import Budgeted, Phase


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
        tiles: the tile of the first layer, the second ...; then from the start again. 0 is a whole
            axis.
        own: whether a query's own tile is always chosen, and counts.
        shape, text_before, text_after: where the grid lies, as `reattend.patterns.grids.Grid`; an
            open shape is taken from a plan's `image_grid`.
        across: whether each row of the map has the budget, or all of a head's together. With
            `tiles` of 1, 2 and 3 axes, `own` and `measure: range` that is VMoBA (Wu et al., arXiv
            2506.23858).
    """

    kind: Literal["blocks"]
    block: int = Field(default=64, gt=0)
    queries: Literal["each", "pooled"] = "each"
    key: Literal["mean", "attended"] = "mean"
    first: int = Field(default=0, ge=0)
    last: int = Field(default=1, gt=0)
    tile: tuple[int, ...] = Field(default=(), max_length=3)
    tiles: tuple[tuple[int, ...], ...] = ()
    own: bool = False
    shape: tuple[int, ...] = ()
    text_before: int = Field(default=0, ge=0)
    text_after: int | None = Field(default=None, ge=0)
    across: Literal["row", "head"] = "row"

    @model_validator(mode="after")
    def _tiles_fit(self) -> Blocks:
        if self.tile and self.tiles:
            raise ValueError("give tile, of all layers, or tiles, of the layers in turn")
        for tile in self.tiles or (self.tile,) if self.shape else ():
            if len(self.shape) != len(tile) or any(
                (t == 0 and not self.tiles) or (t and n % t)
                for t, n in zip(tile, self.shape, strict=True)
            ):
                raise ValueError(f"tile {tile} does not divide the grid {self.shape}")
        tiled = bool(self.tile or self.tiles)
        if tiled and (self.key != "mean" or self.first or self.last > 1):
            raise ValueError("key, first and last are for blocks in a row, not for tiles")
        if self.own and not tiled:
            raise ValueError("own is for tiles; last is for blocks in a row")
        if self.key == "attended" and self.queries == "pooled":
            raise ValueError("key: attended is compared with single queries: queries: each")
        if self.topk is not None and self.topk < self.first + self.last:
            raise ValueError(f"topk {self.topk} is less than first + last, which are always chosen")
        return self

    def at_layer(self, layer: int) -> Blocks:
        """With the tile of this layer."""
        if not self.tiles or not self.shape:
            return self
        tile = self.tiles[layer % len(self.tiles)]
        whole = tuple(t or n for t, n in zip(tile, self.shape, strict=True))
        return self.model_copy(update={"tile": whole, "tiles": ()})

    @property
    def acts(self) -> Phase:
        """Pooled queries are those of a prompt."""
        return "both" if self.queries == "each" else "prefill"

    @property
    def size(self) -> int:
        """Tokens per block."""
        return prod(self.tile) if self.tile else self.block

    def reads(self, length: int) -> int:
        """Blocks of the budget, whole; of a grid, with its text, the share that they are."""
        if self.tile and self.shape:
            text, places = self.text_before + (self.text_after or 0), prod(self.shape)
            read = self.units(places // self.size) * self.size + text
            return round(length * read / (places + text))
        many = -(-length // self.size)
        sure = 0 if self.tile else min(many, self.first + self.last)
        return min(length, max(sure, self.units(many)) * self.size)

    def covers(self, length: int) -> bool:
        """A budget of all rows together leaves some with less."""
        return self.ratio == 1.0 if self.across == "head" else super().covers(length)

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the blocks, or tiles."""
        if self.tile and self.shape:
            return self._quarter(prod(self.shape) // self.size)
        return self._quarter_of_blocks(length, self.block, self.first + self.last + 1)

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
        if core.causal and (self.tile or self.tiles or self.across == "head"):
            return "select: blocks with a tile or across: head looks ahead, the block is causal"
        if (self.tile or self.tiles) and not self.shape:
            return "select: blocks has a tile and no grid: give image_grid, for example [14, 14]"
        if self.tiles:
            return (
                "select: blocks with tiles is for a stack of layers, in the `pattern` of all heads"
            )
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

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the blocks."""
        return self._quarter_of_blocks(length, self.block)

    def misfit(self, core: CoreConfig) -> str | None:
        """A causal block has no passes over one text."""
        return "select: observed is for blocks that are not causal" if core.causal else None
