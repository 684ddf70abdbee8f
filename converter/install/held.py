"""A cache layer of what a mixer makes anew in every call, mostly of constant size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from reattend.errors import UnsupportedCacheError
from reattend.install.kept import KeptLayer, take_layer
from reattend.install.stock import StockState


class HeldLayer(KeptLayer):
    """What one block holds; length and mask sizes as `KeptLayer` tells them.

    Attributes:
        tensors: [B, ..] each; None: nothing yet.
    """

    tensors: tuple[Tensor, ...] | None = None

    def hold(self, tensors: tuple[Tensor, ...], tokens: int) -> None:
        """Keep these, after so many more tokens."""
        self.tensors = tensors
        self.total += tokens
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self.is_initialized = True
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Not for rows.

        Raises:
            UnsupportedCacheError: always.
        """
        raise UnsupportedCacheError(
            "a cache that a block with a state of constant size took over was given rows",
            next_step="pass a new DynamicCache of transformers, or use_cache=False",
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing can be taken back out of a sum.

        Raises:
            UnsupportedCacheError: something would have to be.
        """
        count = -tokens_to_remove if tokens_to_remove < 0 else self.total - tokens_to_remove
        if tokens_to_remove == 0 or count <= 0 or self.tensors is None:
            return
        raise UnsupportedCacheError(
            f"a cache of {self.total} tokens cannot be cut back to {self.total - count}",
            why="a block with linear attention holds sums, which do not forget single tokens",
            next_step="decode without assistance (no prompt lookup, no assistant model)",
        )

    @property
    def rows(self) -> list[Tensor]:
        """All numbers that are held; not the count of tokens."""
        return [t for t in self.tensors or () if t.is_floating_point()]

    def reset(self) -> None:
        """Forget everything."""
        self.tensors = None
        super().reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._each(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.tensors is not None:
            self.tensors = tuple(change(t) for t in self.tensors)
        self._show()

    def _show(self) -> None:
        """What code that knows layers by `keys` and `values` looks at."""
        self.keys, self.values = (None, None) if self.tensors is None else self.tensors[:2]


class HeldState(StockState):
    """One layer of a transformers DynamicCache, for a mixer that holds something of its own.

    Raises:
        UnsupportedCacheError: see `take_layer`.
    """

    def __init__(self, cache: Any, layer_idx: int) -> None:
        super().__init__(cache, layer_idx)
        self.layer = take_layer(cache, layer_idx, HeldLayer)

    def held(self) -> tuple[Tensor, ...] | None:
        """See `HoldingState`."""
        return self.layer.tensors

    def hold(self, tensors: tuple[Tensor, ...], tokens: int) -> None:
        """See `HoldingState`."""
        self.layer.hold(tensors, tokens)
