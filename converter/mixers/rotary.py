"""Rotary position embedding in the normal form: dimension i turns with dimension i + P.

Su et al., RoFormer, arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.base import Context, State
from reattend.mixers.config import GrowthConfig, RotaryConfig


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
    position = positions(ctx, state, x_BND)
    wide = torch.float64 if x_BND.dtype == torch.float64 else torch.float32
    inv_freq = torch.tensor(config.inv_freq, dtype=wide, device=x_BND.device)
    angle_BNP = position[..., None].to(wide) * inv_freq
    return (
        (angle_BNP.cos() * config.scaling).to(x_BND.dtype),
        (angle_BNP.sin() * config.scaling).to(x_BND.dtype),
    )


def positions(ctx: Context, state: State | None, x_BND: Tensor) -> Tensor:
    """[B or 1, N] in tokens: the model's own, or counted from what the state has seen."""
    if ctx.position_BN is not None:
        return ctx.position_BN
    start = state.seen() if state is not None else 0
    return torch.arange(start, start + x_BND.shape[1], device=x_BND.device)[None]


def grown(
    q_BHNd: Tensor, config: GrowthConfig | None, ctx: Context, state: State | None, x_BND: Tensor
) -> Tensor:
    """Queries times their factor by position, where the block has one."""
    if config is None:
        return q_BHNd
    wide = torch.float64 if x_BND.dtype == torch.float64 else torch.float32
    place_BN = positions(ctx, state, x_BND) + config.offset
    if config.smooth:
        grown_BN = (place_BN.to(wide) / config.period).clamp(min=1).log()
    else:
        grown_BN = (place_BN // config.period).to(wide).log1p()
    factor_BN = 1 + config.beta * grown_BN
    return q_BHNd * factor_BN[:, None, :, None].to(q_BHNd.dtype)


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
