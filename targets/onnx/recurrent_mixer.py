"""Recurrent mixers as they are traced: a node of sums, and one of softmax where they have a window.

Layout letters: B batch, N new tokens, H query heads, G KV heads, S heads of the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reattend.kernels.linear_attention.reference import with_ones
from reattend.mixers.base import Context, State
from reattend.mixers.recurrent import Entering, RecurrentAttention, spread
from reattend.passes.rewrite.sparse_build import like
from reattend.targets.onnx.linear_ops import held_linear_attention
from reattend.targets.onnx.sparse_ops import sink_window_attention
from reattend.targets.onnx.state import FixedState


class _Rows(NamedTuple):
    """What new tokens bring, and the states that the ops will write."""

    new: Entering
    state: FixedState


class TracedRecurrent(RecurrentAttention):
    """A RecurrentAttention that also takes a state of fixed capacity; else it is as before."""

    def real(self, x_BND: Tensor, ctx: Context, state: State | None) -> Tensor | None:
        """With a fixed state: its first real row says it."""
        return None if isinstance(state, FixedState) else super().real(x_BND, ctx, state)

    def store(self, new: Any, state: State) -> Any:
        """Nothing yet: the ops write."""
        return _Rows(new, state) if isinstance(state, FixedState) else super().store(new, state)

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        if not isinstance(rows, _Rows):
            return super().attend(query, rows, ctx, span)
        (q, features), (new, state), c = query, rows, self.config
        (past, *rings), (b, _, n, _) = state.past(), q.shape
        start_B, length_B = state.span()
        place_BN = (length_B - start_B)[:, None] - n + torch.arange(n, device=start_B.device)
        real_BN = place_BN >= 0
        k, log = new.k_BSNf * real_BN[:, None, :, None], new.log
        log = k.new_zeros(b, c.state_heads, n) if log is None else log * spread(real_BN, log)
        older, after = held_linear_attention(
            features, k, new.v_BSNc, log, past, decays=new.log is not None
        )
        y = self.finished(older, older.dtype)
        if not rings:
            state.put(after)
            return y.to(q.dtype)
        near, *kept = sink_window_attention(
            q, *new.rows, *rings, start_B, length_B, sinks=0, window=c.window, scale=c.core.scale
        )
        state.put(after, *kept)
        return self.averaged(with_ones(near), y).to(q.dtype)


def traced_recurrent(mixer: RecurrentAttention) -> TracedRecurrent:
    """The same modules in a mixer that can be traced."""
    return like(mixer, TracedRecurrent)
