"""DenseAttention, the normal form: every attention block found is one of these.

Heads are ordered by key/value group, and each head's dimensions as [rotary real | rotary
imaginary | rest]; both are permutations that leave the block's output unchanged.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from reattend.errors import UnsupportedCacheError
from reattend.mixers.base import Context, Mixer, Rows, RowShapes, State
from reattend.mixers.config import BlockConfig, NormConfig, StreamConfig
from reattend.mixers.norm import StreamNorm
from reattend.mixers.relative import RelativeBias
from reattend.mixers.rotary import rotate, rotation
from reattend.mixers.scores import attend


class DenseConfig(BlockConfig):
    """Nothing beyond the block itself."""

    kind: Literal["dense"] = "dense"


class DenseAttention(Mixer):
    """softmax attention as the model had it; caches keys and values of all kv heads."""

    kind = "dense"
    config: DenseConfig

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        core = config.core
        memory = config.memory_size or config.hidden_size
        self.q_proj = nn.Linear(config.hidden_size, core.heads * core.qk_head_dim, config.q.bias)
        self.k_proj = nn.Linear(memory, core.kv_heads * core.qk_head_dim, config.k.bias)
        self.v_proj = nn.Linear(memory, core.kv_heads * core.v_head_dim, config.v.bias)
        self.q_norm = stream_norm(config.q, core.heads, core.qk_head_dim)
        self.k_norm = stream_norm(config.k, core.kv_heads, core.qk_head_dim)
        self.v_norm = stream_norm(config.v, core.kv_heads, core.v_head_dim)
        self.relative = RelativeBias(config.relative, core.heads) if config.relative else None
        self.o_proj: nn.Module = nn.Identity()
        if config.out_features is not None:
            width = core.heads * core.v_head_dim
            self.o_proj = nn.Linear(width, config.out_features, config.out_bias)

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
        offset = state.seen() if state is not None and self.relative is not None else 0
        q = stream(self.q_proj(x_BND), c.core.heads, c.q, self.q_norm, turn, pairs)
        if source_BMD is None:
            return (q, offset), None
        k = stream(self.k_proj(source_BMD), c.core.kv_heads, c.k, self.k_norm, turn, pairs)
        v = stream(self.v_proj(source_BMD), c.core.kv_heads, c.v, self.v_norm, None, 0)
        return (q, offset), (k, v)

    def attend(
        self, query: Any, rows: Rows, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`.

        Raises:
            UnsupportedCacheError: a relative bias with a fixed-capacity state.
        """
        c = self.config
        (q, offset), (k, v) = query, rows
        if span is None:
            return attend(
                q, k, v, c.core, ctx.mask, self.score_bias(q.shape[2], k.shape[2], offset)
            )
        if self.relative is not None:
            raise UnsupportedCacheError(
                "a block with a relative position bias was given a fixed-capacity state",
                next_step="run the model with a transformers cache, or without one",
            )
        y_BHNe, _ = torch.ops.reattend.attention(
            q, k, v, *span, scale=c.core.scale, causal=c.core.causal,
            sliding_window=c.core.window, softcap=c.core.softcap,
        )  # fmt: skip
        return y_BHNe

    def score_bias(self, n: int, m: int, offset: int) -> Tensor | None:
        """The learned bias by distance, where the block has one."""
        return None if self.relative is None else self.relative(n, m, offset)

    @property
    def adds_bias(self) -> bool:
        """Whether there is one."""
        return self.relative is not None


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
    y = y_BNp.unflatten(-1, (heads, -1)).transpose(1, 2)
    if norm is not None and spec is not None and spec.scope == "head" and not spec.after_rotary:
        y = norm(y)
    y = rotate(y, turn, pairs)
    if norm is not None and spec is not None and spec.after_rotary:
        y = norm(y)
    return y if config.scale == 1.0 else y * config.scale
