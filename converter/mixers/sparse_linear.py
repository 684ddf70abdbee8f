"""SparseLinearAttention: softmax over the best blocks of the past, and a sum of all of it.

SLA (Zhang et al., arXiv 2509.24006) for causal blocks; the paper has none. There queries choose by
the mean of their block, which holds later tokens. Here every query chooses by itself, as in MoBA
(Lu et al., arXiv 2502.13189): its own block, as far as it goes, and of the blocks before those
whose mean key it agrees with most. The rest is the sum over all keys so far, through a projection
that starts at zero.

Layout letters: B batch, N new tokens, M cached ones, G KV heads, d key width, f features, c columns
of the state, Q blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reattend.kernels.linear_attention import linear_attention
from reattend.mixers.base import Context, Kept, State
from reattend.mixers.everywhere import Everywhere
from reattend.mixers.keeping import HoldingState, holding
from reattend.mixers.places import places
from reattend.mixers.recurrent import Entering, RecurrentAttention
from reattend.mixers.selecting.blocks import BlocksMethod
from reattend.mixers.selecting.frame import attend_selected
from reattend.mixers.selecting.memo import Memo
from reattend.mixers.sparse_linear_config import SparseLinearConfig
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.routing import Blocks


class Stored(NamedTuple):
    """A call with a cache: what came, all rows, the state before it, and where to hold them."""

    new: Entering
    kept: Kept
    memo: Memo
    state_BSfc: Tensor | None
    held: HoldingState


class SparseLinearAttention(RecurrentAttention):
    """The weights of a LinearAttention, and the projection of the rest."""

    kind = "sparse-linear"
    config: SparseLinearConfig

    def begin(self, config: SparseLinearConfig) -> None:  # type: ignore[override]
        """What there is beside the block's own modules: the projection, and what chooses."""
        super().begin(config)
        self.everywhere = Everywhere(config)
        select = Blocks(kind="blocks", block=config.sparse_block, ratio=config.sparse_top)
        self.pattern = HeadPattern(select=select)
        self.method = BlocksMethod(select, config.core, config.rotary)

    def store(self, new: Any, state: State) -> Any:
        """All rows; they are held by `attend`, which knows the means of their blocks."""
        held = holding(state)
        (keys, values), memo, past = new.rows, Memo(), None
        place_BN = placed(new, None)
        place_BM = place_BN
        if (tensors := held.held()) is not None:
            old_keys, old_values, means, past, old_BM = tensors
            place_BN = placed(new, old_BM.amax(-1) + 1)
            keys, values = torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)
            place_BM = torch.cat([old_BM, place_BN], 1)
            memo.rows_BGQw = means if means.shape[2] else None
        return Stored(new, Kept(keys, values, place_BM, place_BN, memo), memo, past, held)

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        (q, f_q), past = query, None
        if isinstance(rows, Entering):
            new, place_BN = rows, placed(rows, None)
            kept = Kept(new.rows[0], new.rows[1], place_BN, place_BN)
        else:
            new, kept, past = rows.new, rows.kept, rows.state_BSfc
        self._known(ctx.mask, kept.query_place_BN)
        sums, after = linear_attention(f_q, new.k_BSNf, new.v_BSNc, None, past)
        near = attend_selected(q, kept, self.pattern, self.config.core, self.method)
        if isinstance(rows, Stored):
            means = rows.memo.rows_BGQw
            means = kept.keys[:, :, :0] if means is None else means
            rows.held.hold((kept.keys, kept.values, means, after, kept.place_BM), q.shape[2])
        assert self.everywhere is not None and self.everywhere.rest is not None
        both: Tensor = near + self.everywhere.rest(self.finished(sums, near.dtype))
        return both


def placed(new: Entering, before_B: Tensor | None) -> Tensor:
    """Places [B, N] of new tokens behind so many real ones, -1 for padding."""
    b, _, n, _ = new.rows[0].shape
    return places(new.valid_BN, n, new.rows[0].device, before_B).expand(b, n)
