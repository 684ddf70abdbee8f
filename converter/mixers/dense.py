"""DenseAttention, the normal form: every attention block found is one of these.

Heads are ordered by key/value group, and each head's dimensions as [rotary real | rotary
imaginary | rest]; both are permutations that leave the block's output unchanged.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from reattend.mixers.base import Context, Rows, RowShapes, State
from reattend.mixers.block import BlockMixer, project, projection
from reattend.mixers.config import BlockConfig, NormConfig, StreamConfig
from reattend.mixers.norm import StreamNorm
from reattend.mixers.rotary import grown, rotate, rotation
from reattend.mixers.scores import attend, per_head, refuse_opaque


class DenseConfig(BlockConfig):
    """Nothing beyond the block itself."""

    kind: Literal["dense"] = "dense"


class DenseAttention(BlockMixer):
    """softmax attention as the model had it; caches keys and values of all kv heads.

    Attributes:
        outer: weight [D, H e] of the output projection where another module owns it; what the
            block's heads add to the model is judged by it. Not a part of the block, nor stored.
    """

    kind = "dense"
    config: DenseConfig
    outer: Tensor | None = None

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        core = config.core
        memory = config.memory_size or config.hidden_size
        self.q_proj: Any = projection(config.q, config.hidden_size, core.heads * core.qk_head_dim)
        self.k_proj: Any = projection(config.k, memory, core.kv_heads * core.qk_head_dim)
        self.v_proj: Any = projection(config.v, memory, core.kv_heads * core.v_head_dim)
        self.q_norm = stream_norm(config.q, core.heads, core.qk_head_dim)
        self.k_norm = stream_norm(config.k, core.kv_heads, core.qk_head_dim)
        self.v_norm = stream_norm(config.v, core.kv_heads, core.v_head_dim)
        self._outside(config)

    @property
    def row_shapes(self) -> RowShapes:
        """Keys and values of all G kv heads."""
        core = self.config.core
        return (core.kv_heads, core.qk_head_dim), (core.kv_heads, core.v_head_dim)

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Rows | None]:
        """Queries with the tokens seen before them; keys and values."""
        c = self.config
        turn = rotation(c.rotary, ctx, state, x_BND)
        pairs = c.rotary.pairs if c.rotary else 0
        offset = state.seen() if state is not None and self.adds_bias else 0
        q = stream(project(self.q_proj, x_BND, ctx), c.core.heads, c.q, self.q_norm, turn, pairs)
        q = grown(q, c.q.growth, ctx, state, x_BND)
        added = self.added_scores(x_BND, ctx, state)
        if source_BMD is None:
            return (q, offset, added), None
        k = stream(
            project(self.k_proj, source_BMD, ctx), c.core.kv_heads, c.k, self.k_norm, turn, pairs
        )
        v = stream(
            project(self.v_proj, source_BMD, ctx), c.core.kv_heads, c.v, self.v_norm, None, 0
        )
        return (q, offset, added), (k, v)

    def attend(
        self, query: Any, rows: Rows, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        c = self.config
        (q, offset, added), (k, v) = query, rows
        if span is None:
            bias = self.score_bias(q.shape[2], k.shape[2], offset)
            mask = ctx.mask if added is None else added
            return attend(q, k, v, c.core, mask, bias, per_head(self.sinks))
        self._plain_scores()
        refuse_opaque(c.core)
        y_BHNe: Tensor = torch.ops.reattend.attention(
            q, k, v, *span, scale=c.core.scale, causal=c.core.causal,
            sliding_window=c.core.window, softcap=c.core.softcap,
        )[0]  # fmt: skip
        return y_BHNe


def stream_norm(config: StreamConfig, heads: int, width: int) -> StreamNorm | None:
    """The stream's norm, sized for its scope."""
    if config.norm is None:
        return None
    return StreamNorm(config.norm, width if config.norm.scope == "head" else heads * width)


def stream(
    y_BNp: Tensor,
    heads: int,
    config: StreamConfig,
    norm: StreamNorm | None,
    turn: tuple[Tensor, Tensor] | None,
    pairs: int,
) -> Tensor:
    """Projection output [B, N, heads * d] -> [B, heads, N, d]: norm, rotation and scale."""
    spec: NormConfig | None = config.norm
    if norm is not None and spec is not None and spec.scope == "full":
        y_BNp = norm(y_BNp)
    y: Tensor = y_BNp.unflatten(-1, (heads, -1)).transpose(1, 2)
    if norm is not None and spec is not None and spec.scope == "head" and not spec.after_rotary:
        y = norm(y)
    y = rotate(y, turn, pairs)
    if norm is not None and spec is not None and spec.after_rotary:
        y = norm(y)
    return y if config.scale == 1.0 else y * config.scale
