"""What a cache layer holds for a selector: summaries of whole blocks of keys.

Layout letters: B batch, G key/value heads, Q blocks, w width of a summary.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Memo:
    """Rows [B, G, Q, w], counted over whole blocks of each sequence's real tokens; or one row of
    notes, which the next call writes again.

    Rows behind the last whole block are written again before they are read, so a cache that is cut
    back has nothing to do here.
    """

    def __init__(self) -> None:
        self.rows_BGQw: Tensor | None = None

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
