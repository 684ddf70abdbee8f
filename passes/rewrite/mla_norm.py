"""DeepSeek's RMS norm on the latent: what makes it change little. docs/math/mla.md section 11.

The norm divides each token's latent c by its own size, and one gain can only put back the mean
size. What it loses is how sizes differ between tokens. So one of the r rows may be spent on
*ballast*: a row whose value is as nearly the same for every token as a linear map of the block's
keys and values can be, and so large that sizes differ least. `mla_error` measures whether it pays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.passes.rewrite.mla_latent import LatentChoice
from reattend.statistics import SiteStatistics

#: largest energy of the ballast, relative to the latent's
MOST = 8.0
#: of the mean diagonal, added so that the inverse exists
DAMPING = 1e-6


def steadied(latent: LatentChoice, statistics: SiteStatistics) -> LatentChoice:
    """The latent with its ballast as last row, read by nobody.

    The row is u = M^-1 m for the mean m and the second moment M of y = [k | v]: of all linear
    functionals of y, the one closest to a constant. `ballast_energy` says how large it is.
    """
    count = max(statistics.count, 1)
    moment, mean = statistics.gram / count, statistics.total / count
    eye = torch.eye(len(mean), dtype=moment.dtype)
    damped = moment + DAMPING * torch.diagonal(moment).mean().clamp_min(1e-300) * eye
    row = torch.linalg.solve(damped, mean)
    size = float(row @ moment @ row)
    if size > 0:
        row = row / size**0.5
        row = row * ballast_energy(latent.down, row, moment, mean) ** 0.5

    def unread(up: Tensor) -> Tensor:
        return torch.cat([up, up.new_zeros(up.shape[0], 1)], 1)

    return LatentChoice(
        torch.cat([latent.down, row[None]]), unread(latent.key_up), unread(latent.value_up),
        latent.value_mean, latent.energy, latent.balance, latent.rows,
    )  # fmt: skip


def ballast_energy(down: Tensor, row: Tensor, moment: Tensor, mean: Tensor) -> float:
    """The a >= 0 for which |down y|^2 + a (row . y)^2 varies least, relative to its mean.

    Its variance is computed as for normal y, where that of y^T S y, with covariance C, is
    2 tr(S C S C) + 4 m^T S C S m; the ratio variance / mean^2 then has one minimum.

    Args:
        down: [r, Y].
        row: [Y], with mean (row . y)^2 = 1.
        moment: mean of y y^T.
        mean: mean of y.
    """
    covariance = moment - torch.outer(mean, mean)
    centre = down @ mean
    inner = down @ covariance @ down.t()
    with_row = down @ covariance @ row
    own, at = float(row @ covariance @ row), float(row @ mean)
    first = 2 * float(inner.square().sum()) + 4 * float(centre @ inner @ centre)
    cross = 2 * float(with_row.square().sum()) + 4 * at * float(centre @ with_row)
    second = 2 * own**2 + 4 * at**2 * own
    energy = float((down @ moment).mul(down).sum())
    above, below = first - cross * energy, second * energy - cross
    most = MOST * energy
    if above <= 0:
        return 0.0
    return most if below <= 0 else min(above / below, most)


def mean_square(down: Tensor, statistics: SiteStatistics) -> float:
    """Mean square of the latent's entries over the calibration tokens."""
    energy = torch.einsum("ry,yz,rz->", down, statistics.gram, down)
    return float(energy / (max(statistics.count, 1) * down.shape[0]))
