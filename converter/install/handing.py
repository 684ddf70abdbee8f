"""A block whose keys and values later blocks read hands them on, in the model's own order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.errors import UnsupportedCacheError
from reattend.install.binding import read
from reattend.install.pieces import HandedOn
from reattend.mixers.base import Rows, State


class Handing:
    """A state that keeps what the last call attended to; without one below it, only that call's."""

    def __init__(self, below: State | None) -> None:
        self.below = below
        self.rows: Rows | None = None

    def update(self, first: Tensor, second: Tensor) -> Rows:
        """See `State.update`."""
        self.rows = (first, second) if self.below is None else self.below.update(first, second)
        return self.rows

    def seen(self) -> int:
        """See `State.seen`."""
        return 0 if self.below is None else self.below.seen()

    def span(self) -> None:
        """Rows of a fixed-capacity state are not all filled, and the later blocks do not know it.

        Raises:
            UnsupportedCacheError: it is one.
        """
        if self.below is not None and self.below.span() is not None:
            raise UnsupportedCacheError(
                "a block that hands its keys on was given a fixed-capacity state",
                next_step="run the model with a transformers cache, or without one",
            )


def hand_on(hand: HandedOn, arguments: dict[str, Any], state: Handing) -> None:
    """Leave the keys and values [B, G, M, d] of a call where the owner left them."""
    container = read(arguments, hand.container)
    if container is None or state.rows is None:
        return
    made = []
    for stream, heads, columns in zip(hand.streams, hand.heads, hand.columns, strict=True):
        rows_BMp = state.rows["kv".index(stream)].transpose(1, 2).flatten(2)
        if columns != tuple(range(rows_BMp.shape[-1])):
            rows_BMp = rows_BMp.index_select(-1, torch.tensor(columns, device=rows_BMp.device))
        made.append(rows_BMp.unflatten(-1, (heads, -1)).transpose(1, 2))
    container[hand.key] = made[0] if hand.alone else tuple(made)
