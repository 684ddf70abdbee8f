"""A cache layer that keeps, per class of heads, only the rows that later queries may see.

It takes the place of a still empty layer of transformers' DynamicCache and goes on telling the
length, the mask sizes and the kind of the layer it replaced, because layers that were not converted
take their mask from it.

Layout letters: B batch, N new tokens, M kept rows, G key/value heads, d and e widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reattend.errors import UnsupportedCacheError
from reattend.install.stock import StockState
from reattend.mixers.base import Kept
from reattend.mixers.places import places
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.memo import ROLLBACK, Memo
from reattend.mixers.sparse_config import HeadClass, SparseConfig

#: layers whose bookkeeping is known here
_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer)

Layer = TypeVar("Layer", bound="KeptLayer")


class KeptLayer(DynamicLayer):
    """Rows and positions of each class of heads.

    Attributes:
        parts: [keys, values, positions] of each class; positions are -1 in rows that hold nothing.
        memos: what is held for the selector of each class; None: it has none.
        real_B: real tokens of each sequence so far.
        total: tokens so far, padding included.
        floor: the length that `crop` cannot go below.
    """

    def __init__(self, replaced: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replaced = replaced
        self.is_sliding = replaced.is_sliding
        self.parts: list[list[Tensor]] = []
        self.memos: list[Memo | None] = []
        self.real_B: Tensor | None = None
        self.total = 0
        self.floor = 0
        self.record_past = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append; returns (list of `Kept`, None). Called by `KeptState` through the cache."""
        valid_BN, config = kwargs["valid_BN"], kwargs["config"]
        n = key_states.shape[2]
        if not self.is_initialized:
            self._begin(key_states, value_states, config)
        assert self.real_B is not None
        before = self.real_B
        place = places(valid_BN, n, key_states.device, before).expand(key_states.shape[0], n)
        found = []
        for part, memo, c in zip(self.parts, self.memos, config.classes, strict=True):
            index = torch.tensor(c.kv_heads, device=key_states.device)
            keys = torch.cat([part[0], key_states.index_select(1, index)], 2)
            values = torch.cat([part[1], value_states.index_select(1, index)], 2)
            part[:] = [keys, values, torch.cat([part[2], place], 1)]
            found.append(Kept(keys, values, part[2], place, memo))
        self.real_B = before + (n if valid_BN is None else valid_BN.sum(-1))
        self.total += n
        if config.evict:
            # the last tokens of a call of several may be candidates that are taken back
            back = 0 if n == 1 else n if self.record_past else min(n, ROLLBACK)
            next_B, done = (self.real_B - back).clamp_min(0), self.total - back
            for part, c in zip(self.parts, config.classes, strict=True):
                if self._forget(part, c, config, next_B):
                    self.floor = max(self.floor, done)
        self._show()
        return found, None

    def _begin(self, keys: Tensor, values: Tensor, config: SparseConfig) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        batch = keys.shape[0]
        self.real_B = torch.zeros(batch, dtype=torch.long, device=keys.device)
        for c in config.classes:
            heads = len(c.kv_heads)
            self.parts.append([
                keys.new_empty(batch, heads, 0, keys.shape[-1]),
                values.new_empty(batch, heads, 0, values.shape[-1]),
                torch.empty(batch, 0, dtype=torch.long, device=keys.device),
            ])  # fmt: skip
            self.memos.append(Memo() if c.pattern.select else None)
        self.is_initialized = True

    def _forget(
        self, part: list[Tensor], c: HeadClass, config: SparseConfig, next_B: Tensor
    ) -> bool:
        """Drop the rows that no query from position `next_B` on can see; whether there were any."""
        place_BM = part[2]
        if c.pattern.select:  # blocks are counted from the first token, and any may be chosen
            return False
        if c.pattern.monotone:
            stays_BM = c.pattern.sees(next_B[:, None], place_BM, config.core)
            stays_BM = stays_BM | (place_BM >= next_B[:, None])
        elif config.core.pattern in ("sliding", "chunked"):
            stays_BM = own_pattern(config.core, next_B[:, None], place_BM) & (place_BM >= 0)
            stays_BM = stays_BM | (place_BM >= next_B[:, None])
        else:
            return False
        self._reduce(part, stays_BM)
        return not bool(stays_BM.all())

    def _reduce(self, part: list[Tensor], stays_BM: Tensor) -> None:
        """Keep these rows, in their order; where a sequence has fewer, rows of -1 fill up."""
        kept = int(stays_BM.sum(-1).max())
        if kept < stays_BM.shape[1]:
            order = (~stays_BM).long().argsort(dim=-1, stable=True)[:, :kept]
            part[2] = part[2].masked_fill(~stays_BM, -1).gather(1, order)
            for k in (0, 1):
                wide = order[:, None, :, None].expand(-1, part[k].shape[1], -1, part[k].shape[-1])
                part[k] = part[k].gather(2, wide)

    def _show(self) -> None:
        """What code that knows layers by `keys` and `values` looks at."""
        self.keys, self.values = self.parts[0][:2] if self.parts else (None, None)

    @property
    def rows(self) -> list[Tensor]:
        """The keys and values of every class, and what is held for selectors."""
        memos = [t for m in self.memos if m is not None for t in m.rows]
        return [t for part in self.parts for t in part[:2]] + memos

    def get_seq_length(self) -> int:
        """Tokens so far, kept or not."""
        return self.total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the replaced layer would answer."""
        if isinstance(self.replaced, DynamicSlidingWindowLayer):
            self.replaced.cumulative_length = self.total
            return self.replaced.get_mask_sizes(query_length)
        return self.total + query_length, 0

    def activate_past_recording(self) -> None:
        """From now on `crop` may take back all tokens of the last call, if they were several."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens: as many as this negative number, or down to this length.

        Raises:
            UnsupportedCacheError: what the queries before them may see is no longer kept.
        """
        count = -tokens_to_remove if tokens_to_remove < 0 else self.total - tokens_to_remove
        if tokens_to_remove == 0 or count <= 0 or self.real_B is None:
            return
        if self.total - count < self.floor:
            raise UnsupportedCacheError(
                f"a cache of {self.total} tokens cannot be cut back to {self.total - count}",
                why="rows that the tokens before need were dropped, as the pattern allows",
                next_step="convert with evict: false, or decode without assistance",
            )
        self.total -= count
        self.real_B = (self.real_B - count).clamp_min(0)
        for part in self.parts:
            self._reduce(part, (part[2] >= 0) & (part[2] < self.real_B[:, None]))
            part[2] = part[2].masked_fill(part[2] >= self.real_B[:, None], -1)
        self._show()

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.replaced)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._each(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """To the processor's memory."""
        self._each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Back to the device of the model."""
        if self.is_initialized:
            self._each(lambda t: t.to(self.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for part in self.parts:
            part[:] = [change(t) for t in part]
        for memo in self.memos:
            if memo is not None:
                memo.change(change)
        if self.real_B is not None:
            self.real_B = change(self.real_B)
        self._show()


def take_layer(cache: Any, layer_idx: int, kind: type[Layer]) -> Layer:
    """The cache's layer of this kind, put in the place of an empty one at the first call.

    Raises:
        UnsupportedCacheError: the cache is of another kind, or holds this layer's rows already.
    """
    layers: Any = getattr(cache, "layers", None)
    replicated = getattr(cache, "layer_class_to_replicate", None)
    while layers is not None and replicated is not None and len(layers) <= layer_idx:
        layers.append(replicated())
    layer: Any = None
    if layers is not None and layer_idx < len(layers):
        layer = layers[layer_idx]
    if type(layer) is kind:
        return layer
    known = type(layer) in _REPLACEABLE
    if not known or layer.is_initialized:
        what = "that was filled before" if known else f"of type {type(layer).__name__}"
        raise UnsupportedCacheError(
            f"a block that keeps its own state was given a cache with a layer {what}",
            where=f"layer {layer_idx}",
            why="it puts a layer of its own in the place of an empty one",
            next_step="pass a new DynamicCache of transformers, or use_cache=False",
        )
    layers[layer_idx] = made = kind(layer)
    return made


class KeptState(StockState):
    """One layer of a transformers DynamicCache, for a mixer that chooses which rows stay.

    Raises:
        UnsupportedCacheError: see `take_layer`.
    """

    def __init__(self, cache: Any, layer_idx: int) -> None:
        super().__init__(cache, layer_idx)
        take_layer(cache, layer_idx, KeptLayer)

    def keep(
        self, keys: Tensor, values: Tensor, valid_BN: Tensor | None, config: SparseConfig
    ) -> list[Kept]:
        """See `KeepingState`."""
        found, _ = self.cache.update(keys, values, self.layer_idx, valid_BN=valid_BN, config=config)
        sources = [getattr(c.pattern.select, "source", None) for c in config.classes]
        return [
            kept if source is None else kept._replace(memo=self._notes(source))
            for kept, source in zip(found, sources, strict=True)
        ]

    def _notes(self, source: int) -> Memo | None:
        """What another layer of this cache holds for a block of one class of heads."""
        layers = self.cache.layers
        memos = getattr(layers[source], "memos", []) if source < len(layers) else []
        return memos[0] if len(memos) == 1 else None
