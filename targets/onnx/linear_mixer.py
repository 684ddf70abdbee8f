"""Linear mixers as they are traced: one call of the op of their node.

Layout letters: B batch, N new tokens, H query heads, G KV heads, S heads of the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reattend.mixers.base import Context, State
from reattend.mixers.linear import LinearAttention, New
from reattend.mixers.linear_rows import Rows
from reattend.passes.rewrite.sparse_build import like
from reattend.targets.onnx.linear_ops import held_linear_attention, window_linear_attention
from reattend.targets.onnx.state import FixedState


class _Rows(NamedTuple):
    """Rows of new tokens, and the state that the op will write."""

    rows: Rows
    state: FixedState


class TracedLinear(LinearAttention):
    """A LinearAttention that also takes a state of fixed capacity; without one it is as before."""

    def real(self, x_BND: Tensor, ctx: Context, state: State | None) -> Tensor | None:
        """With a fixed state: its first real row says it."""
        return None if isinstance(state, FixedState) else super().real(x_BND, ctx, state)

    def store(self, new: New, state: State) -> Any:
        """Nothing yet: the op writes."""
        return (
            _Rows(new.rows, state) if isinstance(state, FixedState) else super().store(new, state)
        )

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        if not isinstance(rows, _Rows):
            return super().attend(query, rows, ctx, span)
        q, features = query
        made = self._in_window if self.config.window else self._in_state
        return self.finished(made(q, features, rows), q.dtype)

    def _in_state(self, q_BHNd: Tensor, features_BHNf: Tensor, given: _Rows) -> Tensor:
        """Every key goes into the state at once."""
        (keys, values, *more), state, c = given.rows, given.state, self.config
        (past,), (b, _, n, _) = state.past(), q_BHNd.shape
        k = self._features_k(more[0] if more else keys) * (state.places(n) >= 0)[:, None, :, None]
        decay = k.new_zeros(b, c.state_heads, n)
        if c.decay:
            decay = decay + torch.tensor(c.decay, dtype=k.dtype)[:, None]
        y: Tensor
        y, after = held_linear_attention(
            features_BHNf, k, self._columns(values), decay, past, decays=bool(c.decay)
        )
        state.put(after)
        return y

    def _in_window(self, q_BHNd: Tensor, features_BHNf: Tensor, given: _Rows) -> Tensor:
        """Keys go into the state when they leave the window."""
        (keys, values), state, c = given.rows, given.state, self.config
        past_key, past_value, past_state = state.past()
        mix, heads, dtype = self._mix(q_BHNd.dtype), c.core.heads, q_BHNd.dtype
        mix_H = mix[:, 0, 0] if isinstance(mix, Tensor) else torch.full((heads,), mix, dtype=dtype)
        none = torch.zeros(1, 1, 1, dtype=dtype)
        weight, bias = self.features_k.by_head(c.state_heads)
        y: Tensor
        y, *after = window_linear_attention(
            q_BHNd, features_BHNf, keys, values, past_key, past_value, past_state, mix_H,
            none if weight is None else weight, none[0] if bias is None else bias,
            torch.tensor(c.decay or (0.0,) * c.state_heads, dtype=dtype), *state.span(),
            scale=c.core.scale, window=c.window, terraced=c.window_form == "terraced",
            feature_map=c.feature_map, decays=bool(c.decay),
        )  # fmt: skip
        state.put(*after)
        return y


def traced_linear(mixer: LinearAttention) -> TracedLinear:
    """The same modules in a mixer that can be traced."""
    return like(mixer, TracedLinear)
