"""RoutedAttention, Mixture-of-Heads: every token uses some of the heads, weighed by a router.

Keys and values are made and cached of every token and KV group, because any later token may choose
any head; what a token leaves out is the attention of a head to all keys.

Layout letters: B batch, N new tokens, H query heads, U units (`RoutedConfig`), e value width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reattend.mixers.base import Context, Rows, State
from reattend.mixers.dense import DenseAttention
from reattend.mixers.routed_config import RoutedConfig
from reattend.mixers.router import Router, Routes


class RoutedAttention(DenseAttention):
    """The weights of a DenseAttention, and a router."""

    kind = "routed"
    config: RoutedConfig  # type: ignore[assignment]

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.begin(config)

    def begin(self, config: RoutedConfig) -> None:
        """What there is beside the block's own modules."""
        self.config = config
        self.router = Router(config)

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Rows | None]:
        """Queries and their routes; keys and values."""
        query, rows = super().project(x_BND, source_BMD, ctx, state)
        return (query, self.router(x_BND, query[0])), rows

    def attend(
        self, query: Any, rows: Rows, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`; the output of a head that a token leaves out is 0."""
        dense, routes = query
        y_BHNe = super().attend(dense, rows, ctx, span)
        return y_BHNe * self.gates(routes, y_BHNe)

    def gates(self, routes: Routes, like_BHNe: Tensor) -> Tensor:
        """The weight of each query head, [B, H, N, 1]."""
        gate_BHN = routes.gate_BUN.to(like_BHNe.dtype).repeat_interleave(
            self.config.heads_per_unit, 1
        )
        return gate_BHN[..., None]
