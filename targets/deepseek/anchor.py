r"""An RMS norm that changes nothing: one coordinate so large that it alone decides the size.

The DeepSeek classes put an RMS norm on the latent c (and on the query's factor, where there are
two). Give the norm one coordinate more, a constant K that comes from the bias of the projection
before it. The mean square of all r coordinates is then (K^2 + |c|^2) / r, and with the gain
K / sqrt(r) the norm returns

    c K / sqrt(K^2 + |c|^2) = c (1 - |c|^2 / (2 K^2) + ...)

The projection reads x = w * h / rms(h), so |x / w| <= sqrt(D) for every token, and
|c| <= sqrt(D) * |W diag(w)|_2 =: `bound`: no data is needed. The coordinate itself gets gain 0,
so what is cached in its place is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: K / bound: the relative change of c is at most half of this squared, inverted
MARGIN = {torch.float64: 2.0**13, torch.float32: 2.0**11, torch.bfloat16: 2.0**11,
          torch.float16: 2.0**6}  # fmt: skip
LARGEST = {torch.float16: 2.0**14}
#: of the norms on latent and query factor, whatever the config says
EPS = 1e-6


@dataclass(frozen=True)
class Anchor:
    """The constant, the gain of all other coordinates, and the largest relative change of c.

    `correction`: what rounding the gain to the stored type left over; the matrix that reads the
    norm's result is multiplied by it.
    """

    value: float
    gain: float
    correction: float
    error: float


def row_bound(weight_rD: Tensor, gain_D: Tensor, offset_r: Tensor | None = None) -> float:
    """The largest |W x + b| over every x that an RMS norm with this gain can give."""
    wide = weight_rD.double() * gain_D.double()
    gram = wide @ wide.t() if wide.shape[0] <= wide.shape[1] else wide.t() @ wide
    largest = float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())
    offset = 0.0 if offset_r is None else float(offset_r.double().norm())
    return largest * math.sqrt(weight_rD.shape[1]) + offset


def anchor(bound: float, rank: int, dtype: torch.dtype) -> Anchor:
    """The constant for a norm over `rank` coordinates whose others stay below `bound`.

    K and K / sqrt(rank) are both stored in `dtype`: of the numbers between the one wanted and four
    times that, K is the one that rounding changes least.
    """
    bound = max(bound, (rank * EPS) ** 0.5)  # the norm's own eps must not be seen either
    wanted = min(bound * MARGIN[dtype], LARGEST.get(dtype, float("inf")))
    steps = torch.arange(128, 256, dtype=torch.float64) / 128
    values = (2.0 ** math.ceil(math.log2(wanted)) * steps).to(dtype).double()
    gains = values / rank**0.5
    rounding = (gains.to(dtype).double() / gains - 1).abs()
    best = int(rounding.argmin())
    value, gain = float(values[best]), float(gains[best].to(dtype))
    return Anchor(value, gain, float(gains[best]) / gain, bound**2 / value**2)
