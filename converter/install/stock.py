"""transformers' caches, seen as the states of mixers."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class StockState:
    """One layer of a transformers cache, seen as a mixer's state.

    `filled_only`: return no row that was not written yet. A static cache gives its whole
    capacity, and where the model passes no mask nothing else would hide the empty slots.
    """

    def __init__(self, cache: Any, layer_idx: int, filled_only: bool = False) -> None:
        self.cache, self.layer_idx, self.filled_only = cache, layer_idx, filled_only

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append on the token axis; returns everything the layer keeps."""
        end = self.seen() + first.shape[2] if self.filled_only else None
        keys, values = self.cache.update(first, second, self.layer_idx)
        return keys[:, :, :end], values[:, :, :end]

    def seen(self) -> int:
        """Tokens so far."""
        return int(self.cache.get_seq_length(self.layer_idx))

    def span(self) -> tuple[Tensor, Tensor] | None:
        """A transformers cache is described by the model's mask."""
        return None


class CrossState(StockState):
    """One cross-attention layer of a transformers EncoderDecoderCache: written once, then read."""

    def __init__(self, cache: Any, layer_idx: int, filled_only: bool = False) -> None:
        super().__init__(cache.cross_attention_cache, layer_idx, filled_only)
        self.whole = cache

    def stored(self) -> tuple[Tensor, Tensor] | None:
        """The encoder's keys and values, if an earlier call projected them."""
        if not self.whole.is_updated.get(self.layer_idx):
            return None
        layer = self.cache.layers[self.layer_idx]
        return layer.keys, layer.values

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write, and say so to the cache."""
        rows = super().update(first, second)
        self.whole.is_updated[self.layer_idx] = True
        return rows
