"""What stands in for a rotation that was dropped: docs/math/mla.md section 4.

A component that no longer turns is multiplied by a constant c in place of s^2 e^{i delta theta}
(delta the distance, s the table's scaling). `one` takes c = s^2, as every published method does
(for s = 1); `mean` takes its mean over the distances each head looks back, the constant with the
least squared error, so never worse. c costs nothing at run time: it is folded into weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from reattend.mixers.dense import DenseConfig
from reattend.mixers.latent_config import has_own_query
from reattend.statistics import SiteStatistics


@dataclass(frozen=True)
class Phase:
    """Constants per query head and frequency.

    Attributes:
        factor: c, complex [H, P].
        lost: mean |s^2 e^{i delta theta} - c|^2, the squared score error of a dropped component
            relative to its squared score, [H, P].
    """

    factor: Tensor
    lost: Tensor

    def turn(self, config: DenseConfig) -> Tensor:
        """Query maps [H, d, d]: q <- c q at every frequency; dimensions never rotated stay."""
        core = config.core
        pairs = self.factor.shape[1]
        maps = torch.eye(core.qk_head_dim, dtype=torch.float64).repeat(core.heads, 1, 1)
        real = torch.arange(pairs)
        imaginary = real + pairs
        maps[:, real, real] = maps[:, imaginary, imaginary] = self.factor.real
        maps[:, imaginary, real] = self.factor.imag
        maps[:, real, imaginary] = -self.factor.imag
        return maps


def stand_in(
    config: DenseConfig, statistics: SiteStatistics, phase: Literal["one", "mean"]
) -> Phase:
    """The constants of a block.

    With a query norm, c has to be folded into the keys' side, so the heads of a group share it.
    """
    pairs = config.rotary.pairs if config.rotary else 0
    size = (config.rotary.scaling if config.rotary else 1.0) ** 2
    heads = config.core.heads
    mean = torch.zeros(heads, pairs, dtype=torch.complex128)
    if statistics.attention is not None and pairs:
        weight = statistics.attention.head_weight[:, None]
        mean = size * torch.view_as_complex(statistics.attention.phases.contiguous())
        # a head whose scores change nothing keeps them as they are
        mean = torch.where(weight > 0, mean / weight.clamp_min(1e-300), size)
        if per_group(config):
            groups = config.core.kv_heads
            mean = mean.reshape(groups, -1, pairs).mean(1).repeat_interleave(heads // groups, 0)
    factor = mean if phase == "mean" else torch.full_like(mean, size)
    lost = size**2 - 2 * (factor.conj() * mean).real + factor.abs() ** 2
    return Phase(factor, lost.clamp_min(0))


def per_group(config: DenseConfig) -> bool:
    """Whether query rows are out of reach of the fold, because a norm follows them."""
    return has_own_query(config)
