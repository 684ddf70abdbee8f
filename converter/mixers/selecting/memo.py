"""What a cache layer holds for a selector: summaries of whole blocks, and the last queries.

Layout letters: B batch, G key/value heads, Q blocks, w width of a summary, H query heads, N new
tokens, R places of the last queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reattend.errors import UnsupportedCacheError

#: tokens of one call that a cache takes back in any case: assisted decoding tries candidates that
#: way, and does not say so before the first call
ROLLBACK = 64


class Memo:
    """Rows [B, G, Q, w], counted over whole blocks of each sequence's real tokens; or one row of
    notes, which the next call writes again.

    Rows behind the last whole block are written again before they are read, so a cache that is cut
    back has nothing to do here.
    """

    def __init__(self) -> None:
        self.rows_BGQw: Tensor | None = None
        self.last_BHRd: Tensor | None = None
        self.place_BR: Tensor | None = None

    @property
    def rows(self) -> list[Tensor]:
        """All numbers held."""
        return [t for t in (self.rows_BGQw, self.last_BHRd) if t is not None]

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Other rows of the batch, another device."""
        for name in ("rows_BGQw", "last_BHRd", "place_BR"):
            held = getattr(self, name)
            setattr(self, name, held if held is None else how(held))

    def write(self, rows_b: Tensor, done: int, new_bGQw: Tensor, batch: int) -> None:
        """Summaries of the blocks from number `done` on.

        Args:
            rows_b: whose they are, of the batch.
            done: blocks that these rows have.
            new_bGQw: their next ones.
            batch: rows of the batch.
        """
        end = done + new_bGQw.shape[2]
        held = self.rows_BGQw
        if held is None:
            held = new_bGQw.new_zeros(batch, new_bGQw.shape[1], end, new_bGQw.shape[3])
        elif held.shape[2] < end:
            more = held.new_zeros(*held.shape[:2], end - held.shape[2], held.shape[3])
            held = torch.cat([held, more], 2)
        else:
            held = held.clone()  # a copy of the cache may hold the same tensor
        held[rows_b, :, done:end] = new_bGQw.to(held.dtype)
        self.rows_BGQw = held

    def read(self, rows_b: Tensor, whole: int) -> Tensor | None:
        """The first `whole` summaries of these rows; None: nothing was ever written."""
        if self.rows_BGQw is None:
            return None
        if len(rows_b) == len(self.rows_BGQw):
            return self.rows_BGQw[:, :, :whole]
        return self.rows_BGQw.index_select(0, rows_b)[:, :, :whole]

    def recalled(
        self, rows_b: Tensor, new_bHNd: Tensor, first: int, begin: int, block: int, batch: int
    ) -> Tensor:
        """Queries of the tokens from place `begin` on [b, H, first + N - begin, d]; keeps the last.

        Args:
            rows_b: whose they are, of the batch.
            new_bHNd: those of this call, from place `first` on.
            first, begin: see above; no more than a block apart.
            block: tokens of a block.
            batch: rows of the batch.

        Raises:
            UnsupportedCacheError: the cache was cut back further than it remembers.
        """
        size, n = block + ROLLBACK, new_bHNd.shape[2]
        if self.last_BHRd is None or self.place_BR is None:
            self.last_BHRd = new_bHNd.new_zeros(batch, new_bHNd.shape[1], size, new_bHNd.shape[3])
            self.place_BR = rows_b.new_full((batch, size), -1)
        earlier = torch.arange(begin, first, device=rows_b.device)
        if bool((self.place_BR[rows_b][:, earlier % size] != earlier).any()):
            raise UnsupportedCacheError(
                f"a cache was cut back by more than {ROLLBACK} tokens, and then continued",
                why="a block of keys is summarised by its queries, and only the last are held",
                next_step="cut it back by fewer tokens, or begin with a new cache",
            )
        found = torch.cat([self.last_BHRd[rows_b][:, :, earlier % size], new_bHNd], 2)
        kept = torch.arange(max(first, first + n - size), first + n, device=rows_b.device)
        # copies: a copy of the cache may hold the same tensors
        self.last_BHRd, self.place_BR = self.last_BHRd.clone(), self.place_BR.clone()
        slot = kept % size
        self.last_BHRd[rows_b[:, None], :, slot] = new_bHNd[:, :, kept - first].transpose(1, 2)
        self.place_BR[rows_b[:, None], slot] = kept
        return found
