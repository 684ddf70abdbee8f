"""FlowingAttention: causal flow attention over a state of constant size (`flow.py`).

Layout letters: B batch, N new tokens, H heads, e value width, f features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from reattend.kernels.linear_attention import linear_attention
from reattend.mixers.base import Context, State
from reattend.mixers.flow import Flows, flowing
from reattend.mixers.flowing_config import FlowingConfig
from reattend.mixers.keeping import holding
from reattend.mixers.linear import LinearAttention
from reattend.mixers.places import places


class New(NamedTuple):
    """New tokens: features of queries and keys and values [B, H, N, .], which are real [B, N]."""

    f_BHNf: Tensor
    k_BHNf: Tensor
    v_BHNe: Tensor
    valid_BN: Tensor | None


class Flowed(NamedTuple):
    """A call: outputs [B, H, N, e], places of its tokens, and what a cache holds after it."""

    y_BHNe: Tensor
    place_BN: Tensor
    held: tuple[Tensor, ...]


class FlowingAttention(LinearAttention):
    """The weights of a LinearAttention; queries leave something in the state, too."""

    kind = "flowing"
    config: FlowingConfig

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """Queries and their features; what new tokens leave."""
        query, new = super().project(x_BND, source_BMD, ctx, state)
        keys, values = new.rows
        return query, New(query[1], self._features_k(keys), self._columns(values), new.valid_BN)

    def store(self, new: Any, state: State) -> Any:
        """Everything new goes into the sums; outputs are made on the way."""
        held = holding(state)
        made = flowed(new, held.held())
        held.hold(made.held, made.place_BN.shape[1])
        return made

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        made = flowed(rows, None) if isinstance(rows, New) else rows
        self._known(ctx.mask, made.place_BN)
        y: Tensor = made.y_BHNe.to(query[0].dtype)
        return y


def flowed(new: New, held: tuple[Tensor, ...] | None) -> Flowed:
    """Outputs of new tokens, and what is held after them; `held`: before them, None: nothing."""
    f, k, v, valid_BN = new
    state, flows, count_B = None, Flows.none(f), None
    if held is not None:
        state, sums, race, count_B = held
        flows = Flows(sums, race)
    b, _, n, _ = f.shape
    place_BN = places(valid_BN, n, f.device, count_B).expand(b, n)
    made = flowing(f, k, v, place_BN, flows)
    y, after = linear_attention(made.q_BHNf, made.k_BHNf, made.v_BHNe, None, state)
    real_B = place_BN.amax(-1) + 1
    count_B = real_B if count_B is None else count_B.maximum(real_B)  # all new may be padding
    return Flowed(y * made.gate_BHN1, place_BN, (after, *made.after, count_B))
