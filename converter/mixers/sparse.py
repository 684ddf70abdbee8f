"""SparseAttention: softmax attention in which every KV head has a pattern of its own.

Layout letters: B batch, N new tokens, M cached tokens, H query heads, G key/value heads, d and e
key and value head widths.

Patterns speak of positions counted from the first real token of each sequence, so padding moves
nothing. A cache keeps, per class of heads, the rows that a later query may see and their positions
(`KeepingState`); for patterns that never look back at what they dropped, that is a bounded number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reattend.errors import ArgumentError, UnsupportedCacheError
from reattend.mixers.base import Context, Kept, State
from reattend.mixers.dense import DenseAttention
from reattend.mixers.keeping import KeepingState
from reattend.mixers.places import places, usual, valid_tokens
from reattend.mixers.scores import attend, per_head, shown
from reattend.mixers.selecting.frame import attend_selected
from reattend.mixers.selecting.methods import methods
from reattend.mixers.shared_layouts import Layouts
from reattend.mixers.sparse_blocks import by_blocks
from reattend.mixers.sparse_config import SparseConfig
from reattend.parts import picked, query_heads


class New(NamedTuple):
    """Rows of new tokens: keys [B, G, N, d], values [B, G, N, e], which are real [B, N]."""

    keys: Tensor
    values: Tensor
    valid_BN: Tensor | None


class SparseAttention(DenseAttention):
    """The weights of a DenseAttention; each class of heads attends by its own pattern."""

    kind = "sparse"
    config: SparseConfig  # type: ignore[assignment]

    def __init__(self, config: SparseConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.begin(config)

    def begin(self, config: SparseConfig) -> None:
        """What there is beside the block's own modules: what selects, and layouts."""
        self.config = config
        self.layouts = Layouts()
        self.selecting = methods(config)

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """Queries; keys, values and which tokens are real."""
        query, rows = super().project(x_BND, source_BMD, ctx, state)
        assert rows is not None  # never a cross-attention block
        return query[0], New(*rows, valid_tokens(ctx.mask, *x_BND.shape[:2]))

    @property
    def keeps(self) -> bool:
        """Each class keeps rows of its own."""
        return True

    def store(self, new: New, state: State) -> list[Kept]:
        """Each class keeps what later queries may see.

        Raises:
            UnsupportedCacheError: the cache has no place for rows and their positions.
        """
        if not isinstance(state, KeepingState):
            raise UnsupportedCacheError(
                "a block with sparse attention was given a cache that cannot forget",
                why="it keeps, for each class of heads, rows of its own and their positions",
                next_step="pass transformers' DynamicCache, or none (use_cache=False)",
            )
        return state.keep(new.keys, new.values, new.valid_BN, self.config)

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        q_BHNd: Tensor = query
        mask = ctx.mask if ctx.mask is not None and ctx.mask.dim() == 4 else None
        if isinstance(rows, New):
            place = places(rows.valid_BN, q_BHNd.shape[2], q_BHNd.device)
            _fits(self.config, place)
            kept = [
                Kept(picked(rows.keys, c.kv_heads), picked(rows.values, c.kv_heads), place, place)
                for c in self.config.classes
            ]
            if mask is not None and usual(mask, place, self.config.core):
                mask = None
        else:
            self._known(mask, rows[0])
            kept, mask = rows, None
        return self.together(
            [self._class(q_BHNd, number, part, mask) for number, part in enumerate(kept)]
        )

    def together(self, outputs: list[Tensor]) -> Tensor:
        """The classes' outputs [B, heads, N, e] as one, heads in the block's own order."""
        if len(outputs) == 1:
            return outputs[0]
        order = [h for c in self.config.classes for h in query_heads(self.config.core, c.kv_heads)]
        return picked(torch.cat(outputs, 1), [order.index(h) for h in range(len(order))])

    def _known(self, mask: Tensor | None, kept: Kept) -> None:
        """The cache knows the block's own pattern and padding, nothing else a mask may say."""
        place = kept.query_place_BN
        if mask is None or place.shape[1] == 1 or torch.compiler.is_compiling():
            return
        if not usual(mask, place, self.config.core):
            raise ArgumentError(
                "a sparse block with a cache was given a mask that hides more than padding",
                why="its cache keeps rows by their positions, and cannot tell packed texts apart",
                next_step="pass a 2-D attention_mask, or use_cache=False",
            )

    @property
    def depends_on_calls(self) -> str:
        """Selectors that look at all queries of a call, or act in some calls only."""
        found = [c.pattern.select for c in self.config.classes if c.pattern.select]
        return ", ".join(dict.fromkeys(s.kind for s in found if s.depends_on_calls))

    @property
    def decodes_apart(self) -> bool:
        """Selectors that leave keys out while decoding only."""
        found = [c.pattern.select for c in self.config.classes if c.pattern.select]
        return any(s.acts == "decode" for s in found)

    def _class(self, q_BHNd: Tensor, number: int, kept: Kept, mask: Any) -> Tensor:
        """The output of one class' query heads, [B, heads, N, e]."""
        head_class, core = self.config.classes[number], self.config.core
        heads = query_heads(core, head_class.kv_heads)
        whole = len(heads) == core.heads
        q = picked(q_BHNd, heads)
        sinks = per_head(self.sinks)
        if sinks is not None and not whole:
            sinks = sinks[heads]
        own = core.model_copy(update={"heads": len(heads), "kv_heads": len(head_class.kv_heads)})
        if head_class.pattern.select is not None:
            if mask is not None:
                raise ArgumentError(
                    "a block that selects keys was given a mask that hides more than padding",
                    why="what it may choose from is its own pattern and real tokens",
                    next_step="pass a 2-D attention_mask, and one text per row",
                )
            method: Any = self.selecting[str(number)]
            return attend_selected(q, kept, head_class.pattern, own, method, sinks)
        if mask is None and sinks is None:
            y = by_blocks(q, kept, head_class.pattern, core, self.layouts)
            if y is not None:
                return y
        i, j = kept.query_place_BN[:, None, :, None], kept.place_BM[:, None, None, :]
        visible = head_class.pattern.sees(i, j, core) | (i < 0)  # a padded row stays finite
        if mask is not None:
            given = shown(mask[..., : j.shape[-1]])
            if given.shape[1] == core.heads > 1:
                given = picked(given, heads)
            visible = visible & given
        return attend(q, kept.keys, kept.values, own, visible, None, sinks)


def _fits(config: SparseConfig, place_BN: Tensor) -> None:
    """Patterns over a grid are for sequences of its tokens."""
    grids = [g for c in config.classes for g in c.pattern.grids]
    if not grids or torch.compiler.is_compiling():
        return
    for length in {int(n) for n in place_BN.amax(-1) + 1}:
        for grid in grids:
            if not grid.fits(length):
                raise ArgumentError(
                    f"a pattern over a grid of {grid.words()} was given {length} tokens",
                    why="it was converted for images of one size",
                    next_step="pass images of that size, or convert with another image_grid, "
                    "text_before or text_after",
                )
