"""The shared latent: one weighted PCA of unrotated keys and values, docs/math/mla.md section 5.

All methods minimise a mean of (z - z')^T metric (z - z') over maps of rank r, z = [unrotated key
components | v]; they differ in the moment of z (`mla_moments`) and in the metric. TransMLA (arXiv
2502.07864): multiples of the identity for keys and for values. `output`: the score error that
queries see and the output error that W_O lets through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.attention_moments import read_out
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.mla_phase import per_group
from reattend.passes.rewrite.mla_rotary import RotaryChoice
from reattend.statistics import SiteStatistics

#: Directions that no query or no W_O reads keep this share of the largest weight.
FLOOR = 1e-6


@dataclass(frozen=True)
class LatentChoice:
    """The latent as maps of the stacked keys and values y = [k | v].

    Attributes:
        down: [r, G (d + e)].
        key_up: [G d, r] and value_up: [G e, r], back to unrotated keys and to values.
        value_mean: [G e], what is added to values so that their mean is right; zero uncentred.
        energy: eigenvalues of the weighted moment, descending, summing to 1.
        balance: the factor alpha the keys were divided by.
        rows: how many of the r rows keys and values are rebuilt from.
    """

    down: Tensor
    key_up: Tensor
    value_up: Tensor
    value_mean: Tensor
    energy: tuple[float, ...]
    balance: float
    rows: int


@dataclass(frozen=True)
class Latent:
    """Every direction, strongest first; `cut` takes the leading ones.

    `mean` [G (d + e)] is what the compressed deviations deviate from.
    """

    down: Tensor
    key_up: Tensor
    value_up: Tensor
    mean: Tensor
    energy: tuple[float, ...]
    balance: float

    def cut(self, rank: int) -> LatentChoice:
        """The latent of `rank` rows.

        Its coordinates are free: they are chosen so that the columns of [key_up / a | value_up]
        are orthonormal, a equalising the two, as in a plain PCA. A metric would leave them scaled
        unevenly, which training and half types would feel.
        """
        down, key_up, value_up = self.down[:rank], self.key_up[:, :rank], self.value_up[:, :rank]
        key_size, value_size = float(key_up.norm()), float(value_up.norm())
        size = key_size / value_size if key_size > 0 and value_size > 0 else 1.0
        basis, mix = torch.linalg.qr(torch.cat([key_up / size, value_up]))
        key_up, value_up = basis.split([key_up.shape[0], value_up.shape[0]])
        down = mix @ down
        centre = self.mean[key_up.shape[0] :] - value_up @ (down @ self.mean)
        return LatentChoice(down, size * key_up, value_up, centre, self.energy, self.balance, rank)


@dataclass(frozen=True)
class Metric:
    """What an error costs: symmetric, over unrotated key components and over values."""

    keys: Tensor
    values: Tensor


def plain_metric(choice: RotaryChoice, value_width: int) -> Metric:
    """The identity: TransMLA, CARE, MHA2MLA."""
    return Metric(
        torch.eye(choice.key_nope.shape[0], dtype=torch.float64),
        torch.eye(value_width, dtype=torch.float64),
    )


def output_metric(
    dense: DenseAttention, choice: RotaryChoice, statistics: SiteStatistics, turn_Hdd: Tensor
) -> Metric:
    """Keys by the queries that read them, values by W_O.

    A lost key dk costs each query head (q^T dk)^2, in the mean dk^T E[q q^T] dk; a lost value
    |W_O,h dv|^2. Query heads of a group add up; `turn_Hdd` is what stands in for rotations.
    """
    assert statistics.attention is not None
    core = dense.config.core
    groups, e = core.kv_heads, core.v_head_dim
    queries = statistics.attention.queries / statistics.attention.weight.clamp_min(1e-300)
    read = turn_Hdd @ queries @ turn_Hdd.transpose(1, 2)
    grouped = read.reshape(groups, -1, *read.shape[1:]).sum(1)
    stacked = torch.block_diag(*grouped)
    keys = choice.nope_up.t() @ stacked @ choice.nope_up
    if dense.config.out_features is None or dense.config.join is not None:
        return Metric(keys, torch.eye(groups * e, dtype=torch.float64))
    return Metric(keys, torch.block_diag(*read_out(dense).reshape(groups, -1, e, e).sum(1)))


def balance_factor(key_moment: Tensor, value_moment: Tensor, ratio: float) -> float:
    """alpha = mean key column norm / (ratio x mean value column norm); 1 if either vanishes."""
    if key_moment.shape[0] == 0:
        return 1.0
    key = torch.diagonal(key_moment).clamp_min(0).sqrt().mean()
    value = torch.diagonal(value_moment).clamp_min(0).sqrt().mean()
    if float(key) <= 0 or float(value) <= 0:
        return 1.0
    return float(key / (ratio * value))


def cost_factor(metric: Metric, moment: Tensor, ratio: float) -> float:
    """alpha that gives keys ratio^2 times the expected cost of values; 1 if either vanishes."""
    n = metric.keys.shape[0]
    key = float((metric.keys * moment[:n, :n]).sum())
    value = float((metric.values * moment[n:, n:]).sum())
    return (key / value) ** 0.5 / ratio if key > 0 and value > 0 else 1.0


def weighted_pca(
    moment_y: Tensor,
    mean_y: Tensor,
    choice: RotaryChoice,
    metric: Metric,
    ratio: float | None,
    by_cost: bool,
) -> Latent:
    """PCA of z under a metric.

    Args:
        moment_y: mean of y y^T (of the deviations from `mean_y` where that is not zero).
        mean_y: [G (d + e)].
        choice: what stays rotated.
        metric: what errors cost, before keys are divided by alpha.
        ratio: the balance option; None leaves keys and values as they are.
        by_cost: alpha from expected cost rather than from column norms.
    """
    n, values = choice.key_nope.shape[0], metric.values.shape[0]
    key_width = moment_y.shape[0] - values
    to_z = torch.zeros(n + values, moment_y.shape[0], dtype=torch.float64)
    to_z[:n, :key_width] = choice.key_nope
    to_z[n:, key_width:] = torch.eye(values, dtype=torch.float64)
    moment = to_z @ moment_y @ to_z.t()
    alpha = 1.0
    if ratio is not None and by_cost:
        alpha = cost_factor(metric, moment, ratio)
    elif ratio is not None:
        alpha = balance_factor(moment[:n, :n], moment[n:, n:], ratio)
    root, inverse = _root(torch.block_diag(metric.keys / alpha**2, metric.values), n)
    weighted = root.t() @ moment @ root
    strength, basis = torch.linalg.eigh((weighted + weighted.t()) / 2)
    strength, basis = strength.flip(0).clamp_min(0), basis.flip(1)
    largest = basis.abs().argmax(0)
    basis = basis * torch.sign(basis[largest, torch.arange(basis.shape[1])])
    up = inverse.t() @ basis
    share = strength / strength.sum().clamp_min(1e-300)
    return Latent(
        down=basis.t() @ root.t() @ to_z,
        key_up=choice.nope_up @ up[:n],
        value_up=up[n:],
        mean=mean_y,
        energy=tuple(float(s) for s in share),
        balance=alpha,
    )


def fold_turn(dense: DenseAttention, latent: Latent, turn_Hdd: Tensor) -> Latent:
    """Where a norm follows the query's projection, what stands in for rotations moves to the keys.

    score = (turn q)^T key_up c = q^T (turn^T key_up) c, the same turn for all heads of a group.
    """
    if not per_group(dense.config):
        return latent
    core = dense.config.core
    turn_gdd = turn_Hdd[:: core.heads // core.kv_heads].transpose(1, 2)
    up = latent.key_up.reshape(core.kv_heads, core.qk_head_dim, -1)
    return Latent(
        latent.down, (turn_gdd @ up).flatten(0, 1), latent.value_up, latent.mean, latent.energy,
        latent.balance,
    )  # fmt: skip


def _root(metric: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """L with metric = L L^T and its inverse, block by block, weights floored at `FLOOR`."""
    roots, inverses = [], []
    for block in (metric[:border, :border], metric[border:, border:]):
        values, vectors = torch.linalg.eigh((block + block.t()) / 2)
        most = float(values.max()) if len(values) else 0.0
        size = values.clamp_min(FLOOR * most).sqrt() if most > 0 else torch.ones_like(values)
        roots.append(vectors * size)
        inverses.append((vectors / size).t())
    return torch.block_diag(*roots), torch.block_diag(*inverses)
