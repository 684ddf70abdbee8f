"""RoutedAttention, Mixture-of-Heads: every token uses some of the heads, weighed by a router.

Keys and values are made and cached of every token and KV group, because any later token may choose
any head; what a token leaves out is the attention of a head to all keys. Where that saves time the
op `reattend::routed_attention` computes only what is used; elsewhere, and while training, all heads
are computed and weighed. Both are the same function.

Layout letters: B batch, N new tokens, H query heads, U units (`RoutedConfig`), e value width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.mixers.base import Context, Rows, State
from reattend.mixers.dense import DenseAttention
from reattend.mixers.places import valid_tokens
from reattend.mixers.routed_config import RoutedConfig
from reattend.mixers.routed_spans import Span, pays, span_of
from reattend.mixers.router import Router, Routes
from reattend.mixers.schooling import Schooled
from reattend.mixers.scores import refuse_opaque


class RoutedAttention(DenseAttention, Schooled):
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
        real_BN = None
        if self.router.balances is not None:
            real_BN = valid_tokens(ctx.mask, *x_BND.shape[:2])
        return (query, self.router(x_BND, query[0], real_BN)), rows

    def trained(self, share: float) -> None:
        """See `Schooled.trained`."""
        self.router.trained(share)

    def own_loss(self) -> Tensor | None:
        """The balance loss."""
        if not self.router.balances:
            return None
        found = torch.stack(self.router.balances).mean()
        self.router.balances.clear()
        return self.config.balance_loss * found

    @property
    def anneals(self) -> bool:
        """Whether all heads are used at first."""
        return self.config.anneal > 0 and self.config.top_k < self.config.routed

    def attend(
        self, query: Any, rows: Rows, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`; the output of a head that a token leaves out is 0."""
        dense, routes = query
        y_BHNe: Tensor | None = self.skipping(dense, routes, rows, ctx, span)
        if y_BHNe is None:
            y_BHNe = super().attend(dense, rows, ctx, span)
        each, tiles = self.config.heads_per_unit, self.config.tiles
        gate_BHN = routes.gate_BUN.to(y_BHNe.dtype).repeat_interleave(each // tiles, 1)
        if tiles > 1:
            gate_BHN = gate_BHN.repeat(1, tiles, 1)
        weighed: Tensor = y_BHNe * gate_BHN[..., None]
        return weighed

    def skipping(
        self,
        query: Any,
        routes: Routes,
        rows: Rows,
        ctx: Context,
        given: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        """The heads' outputs, unused ones not computed; None where that does not fit or pay."""
        (q, _, added), (k, v), core = query, rows, self.config.core
        if routes.active_BUN is None or torch.is_grad_enabled():
            return None
        span: Span | None
        if given is not None:
            self._plain_scores()
            refuse_opaque(core)
            span = Span(given[0], given[1], core.causal, core.window)
        else:
            biased = self.sinks is not None or self.adds_bias or added is not None
            tracing = torch.compiler.is_compiling()
            if biased or tracing or not pays(self.config, q.device, q.shape[2], k.shape[2]):
                return None
            span = span_of(ctx.mask, core, q, k.shape[2])
        if span is None:
            return None
        from reattend.kernels.routed_attention import routed_attention

        y_BHNe: Tensor = routed_attention(
            q, k, v, routes.active_BUN, span.kv_start_B, span.kv_len_B, scale=core.scale,
            causal=span.causal, sliding_window=span.sliding_window, softcap=core.softcap,
        )[0]  # fmt: skip
        return y_BHNe
