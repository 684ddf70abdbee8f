"""Fit a rotation numerically, whatever its spelling.

Unit vectors are sent through the stream; the d x d matrix that comes back at every position
must be made of 2 x 2 rotations. Half-split, interleaved, complex, partial and scaled rotary
embeddings are then one record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from reattend.passes.find.reasons import NotUnderstood
from reattend.spec import Opaque, Proj, Rotary


@dataclass(frozen=True)
class Rotation:
    """A fitted rotation: cos and sin as applied ([N, P], scaling included)."""

    spec: Rotary | None
    cos_NP: Tensor
    sin_NP: Tensor
    constant: float

    def rescaled(self, factor: float) -> Rotation:
        """The same rotation with `factor` of its scaling moved to a constant beside it."""
        assert self.spec is not None
        spec = replace(self.spec, scaling=self.spec.scaling / factor)
        return Rotation(spec, self.cos_NP / factor, self.sin_NP / factor, self.constant * factor)


def fit_rotation(
    push: Callable[[Tensor], Tensor],
    like: Tensor,
    proj: Proj | Opaque,
    scale_Hd: Tensor,
    precision: float = 1e-5,
) -> Rotation | None:
    """The position-dependent part of a stream, or None if it has none.

    Args:
        push: runs the stream on a projection output [B, N, p] -> [B, H, N, d], in fp64.
        like: zeros of the projection output's shape.
        proj: the row map found at position 0.
        scale_Hd: the factor at position 0.
        precision: relative rounding of the model's own cos and sin.

    Raises:
        NotUnderstood: the map is not made of 2 x 2 rotations shared by all heads.
    """
    ones = push(torch.ones_like(like))
    if bool((ones - ones[:, :, :1]).abs().max() <= 1e-9 * ones.abs().max()):
        return None
    matrix_Nij = _matrices(push, like, proj)
    pairs = _pairs(matrix_Nij)
    rotated = {i for pair in pairs for i in pair}
    passed = [i for i in range(proj.width) if i not in rotated]
    constant = _constant(scale_Hd, passed)
    a = torch.tensor([p[0] for p in pairs])
    b = torch.tensor([p[1] for p in pairs])
    cos, sin = matrix_Nij[:, a, a] / constant, matrix_Nij[:, b, a] / constant
    _check(matrix_Nij / constant, pairs, passed, cos, sin, precision)
    radius = float(cos[0, 0])
    scaling = 1.0 if abs(radius - 1) <= precision else radius
    inv_freq = torch.atan2(sin[1], cos[1])
    spec = Rotary(tuple(pairs), tuple(inv_freq.tolist()), _pairing(pairs), scaling)
    return Rotation(spec, cos, sin, constant)


def _matrices(push: Callable[[Tensor], Tensor], like: Tensor, proj: Proj | Opaque) -> Tensor:
    """R[n, i, j]: output dimension i for a unit in input dimension j, at position n."""
    rows = torch.tensor(proj.rows).reshape(proj.heads, proj.width)
    batch, columns = like.shape[0], []
    for start in range(0, proj.width, batch):
        units = torch.zeros_like(like)
        for slot in range(min(batch, proj.width - start)):
            units[slot][:, rows[:, start + slot]] = 1.0
        out_BHNd = push(units)[: proj.width - start]
        if bool((out_BHNd - out_BHNd[:, :1]).abs().max() > 1e-9):
            raise NotUnderstood("heads rotate differently")
        columns.append(out_BHNd[:, 0])
    return torch.cat(columns).permute(1, 2, 0)


def _pairs(matrix_Nij: Tensor) -> list[tuple[int, int]]:
    """Dimensions that mix, as (a, b) with b receiving +sin of a."""
    moves = (matrix_Nij - matrix_Nij[:1]).abs().amax(0) > 1e-9
    pairs: list[tuple[int, int]] = []
    seen: set[int] = set()
    for i in range(moves.shape[0]):
        partners = [j for j in torch.nonzero(moves[i]).flatten().tolist() if j != i]
        if i in seen or not partners:
            continue
        if len(partners) > 1:
            raise NotUnderstood(f"head dimension {i} mixes with {len(partners)} others by position")
        j = partners[0]
        pairs.append((i, j) if float(matrix_Nij[1, j, i]) >= 0 else (j, i))
        seen |= {i, j}
    if not pairs:
        raise NotUnderstood("the stream depends on position but does not rotate")
    return pairs


def _constant(scale_Hd: Tensor, passed: list[int]) -> float:
    if not passed:
        return 1.0
    factor = scale_Hd[:, passed]
    if bool((factor - factor.flatten()[0]).abs().max() > 1e-12):
        raise NotUnderstood("a stream is scaled per head or per dimension")
    return float(factor.flatten()[0])


def _check(
    matrix: Tensor,
    pairs: list[tuple[int, int]],
    passed: list[int],
    cos: Tensor,
    sin: Tensor,
    precision: float,
) -> None:
    """The matrices are exactly what the record says."""
    rebuilt = torch.zeros_like(matrix)
    for p, (i, j) in enumerate(pairs):
        rebuilt[:, i, i], rebuilt[:, j, j] = cos[:, p], cos[:, p]
        rebuilt[:, j, i], rebuilt[:, i, j] = sin[:, p], -sin[:, p]
    for i in passed:
        rebuilt[:, i, i] = 1.0
    if bool((rebuilt - matrix).abs().max() > 1e-9):
        raise NotUnderstood("position acts on the stream by something that is not a rotation")
    radius = (cos.square() + sin.square()).sqrt()
    if bool((radius - radius[0, 0]).abs().max() > precision * float(radius[0, 0])):
        raise NotUnderstood("rotary scaling differs between positions or frequencies")


def _pairing(pairs: list[tuple[int, int]]) -> Literal["half", "interleaved", "other"]:
    half = len(pairs)
    if pairs == [(i, i + half) for i in range(half)]:
        return "half"
    if pairs == [(2 * i, 2 * i + 1) for i in range(half)]:
        return "interleaved"
    return "other"
