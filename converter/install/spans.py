"""SpanCache: a static cache whose converted layers attend by first row and length.

transformers describes what a static cache holds by a 4-D mask, which no kernel takes. Here the
padding is told once, so a converted layer knows the valid rows of each sequence as two integers
and runs `reattend::attention` or `reattend::latent_attention`: on a GPU the Triton kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from reattend.errors import ArgumentError
from reattend.install.stock import StockState
from reattend.kernels.attention import attention as _attention  # noqa: F401  (registered here)
from reattend.kernels.latent_attention import latent_attention as _latent  # noqa: F401


class SpanState(StockState):
    """One layer: all rows of its tensors, and which of them count."""

    cache: SpanCache
    fresh = False

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append on the token axis; returns the whole capacity."""
        self.fresh = not self._layer().is_initialized
        return super().update(first, second)

    def span(self) -> tuple[Tensor, Tensor] | None:
        """(kv_start_B, kv_len_B) after `update`."""
        layer = self._layer()
        assert layer.keys is not None, "span is asked after update"
        batch, device = layer.keys.shape[0], layer.keys.device
        return self.cache.first_rows(batch, device), layer.cumulative_length.expand(batch)

    def _layer(self) -> StaticLayer:
        layer = self.cache.layers[self.layer_idx]
        assert isinstance(layer, StaticLayer), type(layer)  # `reattend_state` asked
        return layer


class SpanCache(StaticCache):
    """A static cache for converted models, to be passed as ``past_key_values``.

        cache = SpanCache(model.config, 4096, batch["attention_mask"])
        model.generate(**batch, past_key_values=cache)

    Converted layers read the padding given here and no mask of the model: a call with a 4-D mask
    of its own needs another cache. Layers that were not converted, and layers whose cache keeps a
    sliding window only, work as in a `StaticCache`.

    Args:
        config: the model's.
        max_cache_len: tokens it can hold, new ones included.
        attention_mask: [B, N] of the prompts, 1 for real tokens, padding on the left; None where
            there is no padding.

    Raises:
        ArgumentError: a row of the mask is not padding followed by real tokens.
    """

    def __init__(
        self, config: Any, max_cache_len: int, attention_mask: Tensor | None = None
    ) -> None:
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.start_B: Tensor | None = None
        if attention_mask is None:
            return
        real_BN = attention_mask.to(torch.bool)
        if attention_mask.dim() != 2 or bool((real_BN[:, :-1] & ~real_BN[:, 1:]).any()):
            raise ArgumentError(
                "attention_mask must be [batch, tokens] with padding on the left only",
                where="SpanCache",
                next_step='tokenizer.padding_side = "left"',
            )
        self.start_B = (~real_BN).sum(-1)

    def first_rows(self, batch: int, device: torch.device) -> Tensor:
        """First real row of each sequence; `generate` may have made several of one prompt."""
        if self.start_B is None:
            self.start_B = torch.zeros(batch, dtype=torch.int64)
        if self.start_B.device != device:
            self.start_B = self.start_B.to(device)
        return self.start_B.repeat_interleave(batch // self.start_B.shape[0], output_size=batch)

    def reattend_state(self, layer_idx: int) -> StockState:
        """The state of a converted layer; `Adapter` asks for it."""
        if type(self.layers[layer_idx]) is StaticLayer:
            return SpanState(self, layer_idx)
        return StockState(self, layer_idx)
