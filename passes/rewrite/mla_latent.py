"""The shared latent: balanced keys and values, then one PCA (TransMLA, arXiv 2502.07864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.passes.rewrite.mla_rotary import RotaryChoice


@dataclass(frozen=True)
class LatentChoice:
    """The latent as maps of the stacked keys and values y = [k | v].

    Attributes:
        down: [r, G (d + e)].
        key_up: [G d, r] and value_up: [G e, r], back to unrotated keys and to values.
        energy: eigenvalues of the balanced moment, descending, summing to 1.
        balance: the factor alpha the keys were divided by.
    """

    down: Tensor
    key_up: Tensor
    value_up: Tensor
    energy: tuple[float, ...]
    balance: float


def balance_factor(key_moment: Tensor, value_moment: Tensor, ratio: float) -> float:
    """alpha = mean key column norm / (ratio x mean value column norm); 1 if either vanishes."""
    if key_moment.shape[0] == 0:
        return 1.0
    key = torch.diagonal(key_moment).clamp_min(0).sqrt().mean()
    value = torch.diagonal(value_moment).clamp_min(0).sqrt().mean()
    if float(key) <= 0 or float(value) <= 0:
        return 1.0
    return float(key / (ratio * value))


def joint_pca(
    gram: Tensor, choice: RotaryChoice, key_width: int, rank: int, ratio: float
) -> LatentChoice:
    """PCA of z = [unrotated key components / alpha | v].

    Args:
        gram: second moment of y = [k | v], bias left out, [G (d + e), G (d + e)].
        choice: what stays rotated.
        key_width: G d.
        rank: r, at most the number of components of z.
        ratio: the balance option; 1 gives keys and values equal weight.
    """
    nope = choice.key_nope
    n, v = nope.shape[0], gram.shape[0] - key_width
    to_z = torch.zeros(n + v, gram.shape[0], dtype=gram.dtype)
    to_z[:n, :key_width] = nope
    to_z[n:, key_width:] = torch.eye(v, dtype=gram.dtype)
    moment = to_z @ gram @ to_z.t()
    alpha = balance_factor(moment[:n, :n], moment[n:, n:], ratio)
    to_z[:n] /= alpha
    moment = to_z @ gram @ to_z.t()
    values, vectors = torch.linalg.eigh((moment + moment.t()) / 2)
    order = torch.argsort(values, descending=True)
    values, vectors = values[order].clamp_min(0), vectors[:, order]
    largest = vectors.abs().argmax(0)
    vectors = vectors * torch.sign(vectors[largest, torch.arange(vectors.shape[1])])
    basis = vectors[:, :rank]
    share = values / values.sum().clamp_min(1e-300)
    return LatentChoice(
        down=basis.t() @ to_z,
        key_up=alpha * choice.nope_up @ basis[:n],
        value_up=basis[n:],
        energy=tuple(float(s) for s in share),
        balance=alpha,
    )
