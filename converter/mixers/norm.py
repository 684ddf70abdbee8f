"""RMS and layer normalisation of a stream, per head or over its full width."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend.mixers.config import NormConfig


class StreamNorm(nn.Module):
    """Zhang & Sennrich, RMSNorm, arXiv 1910.07467; computed in at least float32.

    `weight` [width] is stored as the model stores it; `gain_offset` is added (Gemma's 1 + w).
    """

    def __init__(self, config: NormConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(width)) if config.gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias else None

    def size(self, x: Tensor) -> Tensor:
        """What the last axis is divided by, float64."""
        wide = x.double()
        if self.config.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        return (wide.square().mean(-1) + self.config.eps).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x if x.dtype == torch.float64 else x.float()
        gain = None if self.weight is None else self.weight + self.config.gain_offset
        if self.config.kind == "layer":
            bias = None if self.bias is None else self.bias.to(wide.dtype)
            scale = None if gain is None else gain.to(wide.dtype)
            return F.layer_norm(wide, wide.shape[-1:], scale, bias, self.config.eps).to(x.dtype)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.eps)
        if gain is None:
            return y.to(x.dtype)
        if self.config.gain_offset:
            return (y * gain.to(y.dtype)).to(x.dtype)
        return y.to(x.dtype) * gain


def normed_heads(y_BNp: Tensor, heads: int, norm: StreamNorm | None) -> Tensor:
    """[B, N, heads, d], normalised per head or over the full width."""
    if norm is not None and norm.config.scope == "full":
        y_BNp = norm(y_BNp)
    y: Tensor = y_BNp.unflatten(-1, (heads, -1))
    if norm is not None and norm.config.scope == "head":
        y = norm(y)
    return y
