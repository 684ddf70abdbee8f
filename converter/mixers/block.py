"""What dense and latent blocks share: what is added to scores, and how heads reach the output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import UnsupportedCacheError
from reattend.mixers.base import Context, Mixer, State
from reattend.mixers.config import BlockConfig, GateConfig, OpaqueConfig, StreamConfig
from reattend.mixers.relative import RelativeBias

_ACTS = {
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda g: g,
}


class OpaqueProjection(nn.Module):
    """A block's own computation where a linear projection usually stands: [B, N, D] -> [B, N, p].

    `program` holds its weights, as parameters.
    """

    def __init__(self, config: OpaqueConfig) -> None:
        super().__init__()
        from reattend.program import ProgramModule

        self.rows, self.extras = config.rows, config.extras
        self.program = ProgramModule(config.program)

    def forward(self, x_BND: Tensor, extras: tuple[Tensor, ...] = ()) -> Tensor:
        """The rows of the stream; `extras` as in `Context`."""
        y: Tensor = self.program(x_BND, *(extras[i] for i in self.extras))
        if self.rows == tuple(range(y.shape[-1])):
            return y
        return y.index_select(-1, torch.tensor(self.rows, device=y.device))


def projection(config: StreamConfig, inside: int, outside: int) -> nn.Module:
    """A stream's projection: linear, or the model's own."""
    if config.opaque is not None:
        return OpaqueProjection(config.opaque)
    return nn.Linear(inside, outside, config.bias)


def project(module: nn.Module, x_BND: Tensor, ctx: Context) -> Tensor:
    """Run a stream's projection."""
    if isinstance(module, OpaqueProjection):
        y: Tensor = module(x_BND, ctx.extras)
    else:
        y = module(x_BND)
    return y


class BlockMixer(Mixer):
    """A mixer whose block may add to its scores, have sinks, and join its heads by a gate.

    `join` is part of the block's outside: every family keeps it as the model had it.
    """

    config: BlockConfig

    def _outside(self, config: BlockConfig) -> None:
        """Make the parts; call once in `__init__`, before `o_proj` is set."""
        from reattend.program import ProgramModule

        core = config.core
        width = core.heads * core.v_head_dim
        self.relative = RelativeBias(config.relative, core.heads) if config.relative else None
        self.sinks = nn.Parameter(torch.zeros(core.heads)) if core.sinks else None
        self.added = ProgramModule(config.added.program) if config.added is not None else None
        self.g_proj: nn.Linear | None = None
        if config.gate is not None:
            out = core.heads if config.gate.per_head else width
            self.g_proj = nn.Linear(config.hidden_size, out, config.gate.bias)
        self.joint = ProgramModule(config.join.program) if config.join is not None else None
        self.o_proj = nn.Identity()
        if config.out_features is not None:
            inside = width if config.join is None else config.join.width
            self.o_proj = nn.Linear(inside, config.out_features, config.out_bias)

    def score_bias(self, n: int, m: int, offset: int) -> Tensor | None:
        """By distance (T5) or by key position (ALiBi), where the block has one.

        ALiBi, Press et al., arXiv 2108.12409. A softmax does not see what is added to a whole
        row, so slope x key position is slope x distance, and left padding cancels.
        """
        if self.relative is not None:
            bias: Tensor = self.relative(n, m, offset)
            return bias
        if self.config.alibi is None:
            return None
        like = next(p for p in self.parameters() if p.is_floating_point())
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        slopes = torch.tensor(self.config.alibi, dtype=wide, device=like.device)
        place_M = torch.arange(m, device=like.device) - (m - 1)
        return slopes[None, :, None, None] * place_M

    @property
    def adds_bias(self) -> bool:
        """Whether `score_bias` adds something."""
        return self.relative is not None or self.config.alibi is not None

    def added_scores(self, x_BND: Tensor, ctx: Context, state: State | None) -> Tensor | None:
        """What the block's own program adds to its scores [.., H or 1, N, M], None without one.

        Raises:
            UnsupportedCacheError: there is a cache, whose tokens the program does not know.
        """
        if self.added is None or self.config.added is None:
            return None
        if state is not None:
            raise UnsupportedCacheError(
                "a block that computes what it adds to its scores was given a cache",
                next_step="call the model with use_cache=False",
            )
        added: Tensor = self.added(x_BND, *(ctx.extras[i] for i in self.config.added.extras))
        while added.dim() < 4:
            added = added[None]
        order = self.config.added.heads
        if added.shape[1] == len(order) > 1 and order != tuple(range(len(order))):
            added = added.index_select(1, torch.tensor(order, device=added.device))
        return added

    def join(self, heads: Tensor, x_BND: Tensor) -> Tensor:
        """[B, H, N, e] -> [B, N, H e]: gated, or by the block's own program."""
        if self.joint is not None:
            assert self.config.join is not None
            order = self.config.join.heads
            if order != tuple(range(len(order))):
                heads = heads.index_select(1, torch.tensor(order, device=heads.device))
            y: Tensor = self.joint(heads, x_BND)
            return y
        y = heads.transpose(1, 2)
        if self.g_proj is not None:
            assert self.config.gate is not None
            y = y * gate(self.config.gate, self.g_proj(x_BND), y)
        return y.flatten(2)

    def _plain_scores(self) -> None:
        """Refuse a fixed-capacity state where the op has no input for what the block adds.

        Raises:
            UnsupportedCacheError: the block has sinks or a position bias.
        """
        what = "logit sinks" if self.sinks is not None else "a position bias"
        if self.sinks is not None or self.adds_bias:
            raise UnsupportedCacheError(
                f"a block with {what} was given a fixed-capacity state",
                next_step="run the model with a transformers cache, or without one",
            )


def gate(config: GateConfig, g_BNp: Tensor, y_BNHe: Tensor) -> Tensor:
    """The factor of every head's output, broadcast to [B, N, H, e]."""
    acts: Any = _ACTS
    factor: Tensor = acts[config.act](g_BNp)
    return factor[..., None] if config.per_head else factor.unflatten(-1, y_BNHe.shape[-2:])
