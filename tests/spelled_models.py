"""Attention blocks as people write them, one deviation each, around which tests are built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

WIDTH, HEADS, GROUPS, HEAD = 32, 4, 2, 8


def rotated(x: Tensor) -> Tensor:
    """Half-split rotary embedding at positions 0, 1, ..."""
    n, half = x.shape[2], HEAD // 2
    angle = torch.arange(n, dtype=x.dtype)[:, None] / 100 ** (torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """Causal grouped attention with rotary positions; tests subclass it."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD)
        self.k_proj = nn.Linear(WIDTH, GROUPS * HEAD)
        self.v_proj = nn.Linear(WIDTH, GROUPS * HEAD)
        self.o_proj = nn.Linear(HEADS * HEAD, WIDTH)
        self.g_proj = nn.Linear(WIDTH, HEADS * HEAD)
        self.h_proj = nn.Linear(WIDTH, HEADS, bias=False)
        self.a_proj = nn.Linear(WIDTH, 4, bias=False)
        self.b_proj = nn.Linear(4, HEADS * HEAD, bias=False)
        self.gain = nn.Parameter(torch.rand(HEADS, HEAD) + 0.5)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.norm = nn.LayerNorm(HEADS * HEAD)
        self.conv = nn.Conv1d(HEADS * HEAD, HEADS * HEAD, 3, padding=1)

    def queries(self, x: Tensor) -> Tensor:
        """[B, N, H, d]."""
        return self.q_proj(x).unflatten(-1, (HEADS, HEAD))

    def keys(self, x: Tensor) -> Tensor:
        """[B, N, G, d]."""
        return self.k_proj(x).unflatten(-1, (GROUPS, HEAD))

    def values(self, x: Tensor) -> Tensor:
        """[B, N, G, d]."""
        return self.v_proj(x).unflatten(-1, (GROUPS, HEAD))

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, N, d] each, to [B, H, N, d]."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def joined(self, y: Tensor, x: Tensor) -> Tensor:
        """[B, N, H, d] -> [B, N, H d]."""
        return y.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (t.transpose(1, 2) for t in (self.queries(x), self.keys(x), self.values(x)))
        q, k = rotated(q), rotated(k)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        y = self.core(q, k, v).transpose(1, 2)
        return self.o_proj(self.joined(y, x))


def variant(**methods: Callable[..., Any]) -> type[Block]:
    """A subclass with some methods replaced."""
    return type("Variant", (Block,), methods)


class Model(nn.Module):
    """A norm, the block as a module of its own, a residual."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), block

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return x + self.attn(self.norm(x))


def built(**methods: Callable[..., Any]) -> Model:
    """A model with weights of order one."""
    torch.manual_seed(3)
    model = Model(variant(**methods)()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.shape != (HEADS, HEAD):
                parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    return model


def inputs(batch: int = 2, length: int = 11) -> dict[str, Tensor]:
    """Example inputs."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"x": torch.randn(batch, length, WIDTH, generator=generator)}
