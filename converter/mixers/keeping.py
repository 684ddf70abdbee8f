"""States that hold something else than a row of every token."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from reattend.errors import UnsupportedCacheError
from reattend.mixers.base import Kept, State


@runtime_checkable
class KeepingState(State, Protocol):
    """A state that keeps for each class of heads the rows that later queries may see."""

    def keep(
        self, keys: Tensor, values: Tensor, valid_BN: Tensor | None, config: Any
    ) -> list[Kept]:
        """Append new rows and return, per class, all that the new queries may see.

        Args:
            keys, values: of the new tokens, [B, G, N, d] and [B, G, N, e].
            valid_BN: which new tokens are real; None: all.
            config: the block's `SparseConfig`.
        """
        ...


@runtime_checkable
class HoldingState(State, Protocol):
    """Tensors [B, ..] that a mixer makes anew in every call, mostly of constant size."""

    def held(self) -> tuple[Tensor, ...] | None:
        """What the last call left; None: nothing was stored yet."""
        ...

    def hold(self, tensors: tuple[Tensor, ...], tokens: int) -> None:
        """Keep these in place of what there was, after `tokens` more (padding included)."""
        ...


def holding(state: State) -> HoldingState:
    """The state, if it is one that holds sums.

    Raises:
        UnsupportedCacheError: it has no place for them.
    """
    if not isinstance(state, HoldingState):
        raise UnsupportedCacheError(
            "a block with linear attention was given a cache of rows",
            why="it holds sums over tokens, which have no place there",
            next_step="pass transformers' DynamicCache, or none (use_cache=False)",
        )
    return state
