"""A learned change of what queries or keys are projected from: x + f(x).

f = Linear - LayerNorm - LeakyReLU - Linear, as in LinFusion (Liu et al., arXiv 2409.02097). The
last projection starts at zero, so the start is the block's own projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class InputMap(nn.Module):
    """[B, N, D] -> [B, N, D]."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(hidden, width), nn.LayerNorm(width)
        self.outer = nn.Linear(width, hidden)

    def start(self, seed: int) -> None:
        """Inner weights from a generator of their own, uniform in 1 / sqrt(D); outer ones zero."""
        generator = torch.Generator().manual_seed(seed)
        bound = self.inner.in_features**-0.5
        with torch.no_grad():
            for parameter in (self.inner.weight, self.inner.bias):
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(bound * (2 * drawn - 1))
            self.outer.weight.zero_()
            self.outer.bias.zero_()

    def forward(self, x_BND: Tensor) -> Tensor:
        """x + f(x)."""
        y: Tensor = x_BND + self.outer(F.leaky_relu(self.norm(self.inner(x_BND))))
        return y
