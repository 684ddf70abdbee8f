"""One attention block behind a norm, with a residual: the smallest model a block can stand in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 32


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def made(block: Callable[[], nn.Module]) -> Model:
    """The same weights every time."""
    torch.manual_seed(3)
    return Model(block()).eval()


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))}
