"""Recurrent mixers as they are traced: a node of sums, and one of softmax where they have a window.

Layout letters: B batch, N new tokens, H query heads, G KV heads, S heads of the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reattend.kernels.linear_attention.reference import with_ones
from reattend.mixers.base import Context, State
from reattend.mixers.flow import Flows, flowing
from reattend.mixers.flowing import FlowingAttention
from reattend.mixers.linear import LinearAttention
from reattend.mixers.linear_rows import Lined
from reattend.mixers.recurrent import RecurrentAttention, spread
from reattend.mixers.selective import SelectiveAttention
from reattend.passes.rewrite.sparse_build import like
from reattend.targets.onnx.linear_ops import held_linear_attention
from reattend.targets.onnx.sparse_ops import sink_window_attention
from reattend.targets.onnx.state import FixedState


class _Rows(NamedTuple):
    """What new tokens bring, and the states that the ops will write."""

    new: Any
    state: FixedState


class _Traced(LinearAttention):
    """Takes a state of fixed capacity too; else it is as before."""

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
        return self.held(query, rows.new, rows.state)

    def held(self, query: Any, new: Any, state: FixedState) -> Tensor:
        """`attend` with a fixed state, which the ops read and write."""
        raise NotImplementedError


class TracedRecurrent(_Traced, RecurrentAttention):
    """A RecurrentAttention with the nodes of its sums and of its window."""

    def held(self, query: Any, new: Any, state: FixedState) -> Tensor:
        """See `_Traced.held`."""
        (q, features), c = query, self.config
        (past, *rings), (b, _, n, _) = state.past(), q.shape
        real_BN = state.places(n) >= 0
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
            q, *new.rows, *rings, *state.span(), sinks=0, window=c.window, scale=c.core.scale
        )
        state.put(after, *kept)
        return self.averaged(with_ones(near), y).to(q.dtype)


class TracedSelective(_Traced, SelectiveAttention):
    """A SelectiveAttention with the node of its sums; rows its convolutions see are states too."""

    def held(self, query: Any, new: Any, state: FixedState) -> Tensor:
        """See `_Traced.held`."""
        (past, *tails), n, kept = state.past(), new.dt_BHN.shape[2], self.config.held_rows
        place_BN = state.places(n)
        real_BN = place_BN >= 0
        real_B1N1 = real_BN[:, None, :, None]
        seen = [torch.cat([t, x * real_B1N1], 2) for t, x in zip(tails, new.rows, strict=True)]
        convs = (self.conv_k, self.conv_v, self.conv_q)
        made = self.behind(
            new._replace(dt_BHN=new.dt_BHN * real_BN[:, None]),
            Lined(new.rows, None, place_BN, None),
            *(conv(x)[:, :, kept:] for conv, x in zip(convs, seen, strict=True)),
        )
        k, v, log = made.entering.k_BSNf, made.entering.v_BSNc, made.entering.log
        y, after = held_linear_attention(made.q_BHNd, k, v, log, past, decays=True)
        state.put(after, *(x[:, :, -kept:] for x in seen))
        return self.gated(y, v, query)


class TracedFlowing(_Traced, FlowingAttention):
    """A FlowingAttention with the node of its last sum; the others are states too."""

    def held(self, query: Any, new: Any, state: FixedState) -> Tensor:
        """See `_Traced.held`."""
        (f, k, v, _), (past, sums, race) = new, state.past()
        made = flowing(f, k, v, state.places(f.shape[2]), Flows(sums, race))
        none = f.new_zeros(f.shape[:3])
        y, after = held_linear_attention(*made[:3], none, past, decays=False)
        state.put(after, *made.after)
        outputs: Tensor = (y * made.gate_BHN1).to(query[0].dtype)
        return outputs


#: by the kind of the mixer
_TRACED = {
    "recurrent": TracedRecurrent, "selective": TracedSelective, "flowing": TracedFlowing,
}  # fmt: skip


def traced_recurrent(mixer: LinearAttention) -> LinearAttention:
    """The same modules in a mixer that can be traced."""
    return like(mixer, _TRACED[mixer.kind])
