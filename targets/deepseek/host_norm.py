"""An RMS norm, recognised by what it computes.

Layout letters: D hidden width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class NotThere(Exception):
    """Why a part is not what a DeepSeek model has in its place."""


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean x^2 + eps) * gain, gain [D] in float64 with any offset included."""

    gain: Tensor
    eps: float


def rms_norm(module: nn.Module, path: str) -> Norm:
    """Gain and eps of an RMS norm, measured on the module itself in float32.

    Raises:
        NotThere: it computes something else.
    """
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].dim() != 1:
        raise NotThere(f"{path} is not an RMS norm with one gain")
    stored = parameters[0].detach().double().cpu()
    alone = copy.deepcopy(module).to("cpu", torch.float32)
    x = torch.randn(2, len(stored), generator=torch.Generator().manual_seed(3))
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        large, small = alone(x[None])[0].double(), alone(SMALL * x[None])[0].double()
    unit = x.double()
    gain = (large * unit).sum(0) / unit.square().sum(0)
    exact = next((stored + o for o in (0.0, 1.0) if _near(gain, stored + o)), None)
    if exact is None:
        raise NotThere(f"{path} is not an RMS norm with a gain")
    whole = unit * exact
    share = float((small * whole).sum() / whole.square().sum())  # s / sqrt(s^2 + eps)
    eps = _stated(module, SMALL**2 * (share**-2 - 1))
    if not _near(small, SMALL / (SMALL**2 + eps) ** 0.5 * whole):
        raise NotThere(f"{path} is not an RMS norm")
    return Norm(exact, eps)


#: scale of inputs at which eps shows
SMALL = 1e-3


def _near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= 1e-4 * float(other.abs().max().clamp_min(1e-6))


def _stated(module: nn.Module, measured: float) -> float:
    """The number among the module's attributes that was measured, else the measurement."""
    said = [v for v in vars(module).values() if isinstance(v, float) and v > 0]
    nearest = min(said, key=lambda v: abs(v - measured), default=measured)
    return nearest if abs(nearest - measured) <= 1e-3 * nearest else max(measured, 0.0)
