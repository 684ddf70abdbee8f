"""Rotary position embedding in the normal form: dimension i turns with dimension i + P.

Su et al., RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.base import Context, State
from reattend.mixers.config import RotaryConfig


def rotation(
    config: RotaryConfig | None, ctx: Context, state: State | None, x_BND: Tensor
) -> tuple[Tensor, Tensor] | None:
    """cos, sin [B or 1, N, P] for this call: the model's own where it passes them.

    Otherwise angles are position x inv_freq in float32, like the model's, with positions
    counted from the tokens the state has seen.
    """
    if config is None:
        return None
    if ctx.rotation is not None:
        return ctx.rotation
    position = ctx.position_BN
    if position is None:
        start = state.seen() if state is not None else 0
        position = torch.arange(start, start + x_BND.shape[1], device=x_BND.device)[None]
    wide = torch.float64 if x_BND.dtype == torch.float64 else torch.float32
    inv_freq = torch.tensor(config.inv_freq, dtype=wide, device=x_BND.device)
    angle_BNP = position[..., None].to(wide) * inv_freq
    return (
        (angle_BNP.cos() * config.scaling).to(x_BND.dtype),
        (angle_BNP.sin() * config.scaling).to(x_BND.dtype),
    )


def rotate(x_BhNd: Tensor, turn: tuple[Tensor, Tensor] | None, pairs: int) -> Tensor:
    """Turn the first 2 * pairs dimensions of every head."""
    if turn is None or pairs == 0:
        return x_BhNd
    cos, sin = (t[:, None].to(x_BhNd.dtype) for t in turn)
    real, imaginary = x_BhNd[..., :pairs], x_BhNd[..., pairs : 2 * pairs]
    turned = [real * cos - imaginary * sin, imaginary * cos + real * sin]
    if x_BhNd.shape[-1] > 2 * pairs:
        turned.append(x_BhNd[..., 2 * pairs :])
    return torch.cat(turned, -1)
