"""One key and one value head in the place of several: docs/math/heads.md section 1.

Heads g = 1..m of width w hold y_g, linear in the token. One head c = sum_g D_g y_g is stored in
their place, and whoever read y_g reads U_g c. Which U and D:

- `mean`: D_g = 1 / m, U_g = 1: mean pooling (Ainslie et al., arXiv 2305.13245).
- `procrustes`: the same after turning every head towards the mean of all, U_g orthogonal.
- `joint`: what loses least of sum_g E[(y_g - U_g c)^H M_g (y_g - U_g c)], M_g what an error of head
  g costs: the leading eigenvectors of the weighted moment.

All work on complex numbers too, because that is what rotary keys are: a rotation multiplies pair f
of every head by one phase, and of all linear maps of the pair only complex factors commute with it.
So every pair is solved by itself, m complex heads of width 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reattend.mixers.config import RotaryConfig

Method = Literal["joint", "procrustes", "mean"]
#: Directions that nothing reads keep this share of the largest weight.
FLOOR = 1e-6
#: Rounds of turning every head towards the others; each can only bring them closer.
ROUNDS = 100


class Merge(NamedTuple):
    """`up` [m, w, w], `down` [w, m w]; what is lost, and what there was, of the weighted energy."""

    up: Tensor
    down: Tensor
    lost: float
    whole: float


def merge(moment: Tensor, cost: Tensor, method: Method) -> Merge:
    """One head for m.

    Args:
        moment: E[y y^H] over the stacked heads, [m w, m w], real or complex.
        cost: M_g, [m, w, w].
        method: see above.
    """
    heads, width = cost.shape[:2]
    eye = torch.eye(width, dtype=moment.dtype).repeat(heads, 1, 1)
    if method == "joint":
        up, down = _joint(moment, cost)
    else:
        up = eye if method == "mean" else _turned(moment, eye)
        down = torch.cat([u.conj().t() for u in up], 1) / heads
    left = torch.eye(len(moment), dtype=moment.dtype) - up.flatten(0, 1) @ down
    missing = left @ moment @ left.conj().t()
    weight = torch.block_diag(*cost)
    lost, whole = ((weight * m.t()).sum().real.clamp_min(0) for m in (missing, moment))
    return Merge(up, down, float(lost), float(whole))


def merge_keys(rotary: RotaryConfig | None, moment: Tensor, cost: Tensor, method: Method) -> Merge:
    """One key head [P real | P imaginary | rest] for m, by maps that commute with the rotation.

    Args:
        rotary: of the block.
        moment: of the keys before they are rotated, [m d, m d].
        cost: second moments of the queries that read each head, [m, d, d].
        method: of every pair, and of the dimensions that are not rotated.
    """
    heads, d = cost.shape[:2]
    pairs = rotary.pairs if rotary is not None else 0
    up, down = moment.new_zeros(heads, d, d), moment.new_zeros(d, heads, d)
    lost = whole = 0.0
    block = moment.reshape(heads, d, heads, d)
    for f in range(pairs):
        # a turned pair meets queries at all angles: |q|^2 |dk|^2 / 2
        weight = (cost[:, f, f] + cost[:, f + pairs, f + pairs]) / 2
        found = merge(_pair(block, f, pairs), weight[:, None, None].to(torch.complex128), method)
        turns = ((up, found.up[:, 0, 0]), (down.transpose(0, 1), found.down[0]))
        for into, factor in turns:
            into[:, f, f] = into[:, f + pairs, f + pairs] = factor.real
            into[:, f + pairs, f] = factor.imag
            into[:, f, f + pairs] = -factor.imag
        lost, whole = lost + found.lost, whole + found.whole
    if 2 * pairs < d:
        rest = slice(2 * pairs, d)
        own = block[:, rest, :, rest].reshape(heads * (d - 2 * pairs), -1)
        found = merge(own, cost[:, rest, rest], method)
        up[:, rest, rest] = found.up
        down[rest, :, rest] = found.down.unflatten(1, (heads, -1))
        lost, whole = lost + found.lost, whole + found.whole
    return Merge(up, down.flatten(1), lost, whole)


def _pair(block: Tensor, f: int, pairs: int) -> Tensor:
    """E[k k^H] of pair f over heads, complex [m, m]; `block` [m, d, m, d]."""
    real, imaginary = block[:, f], block[:, f + pairs]
    same = real[:, :, f] + imaginary[:, :, f + pairs]
    return torch.complex(same, imaginary[:, :, f] - real[:, :, f + pairs])


def _joint(moment: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """`up` and `down` of the least weighted error.

    Their coordinates are free; these have columns of `up` of size sqrt(m) at right angles, and a
    mean over heads as near the identity as that allows, so heads that are alike stay as they are.
    """
    heads, width = cost.shape[:2]
    root, inverse = _roots(cost)
    weighted = root @ moment @ root.conj().t()
    _, vectors = torch.linalg.eigh((weighted + weighted.conj().t()) / 2)
    basis = vectors[:, -width:]
    orthogonal, mix = torch.linalg.qr(inverse @ basis)
    up = (orthogonal * heads**0.5).unflatten(0, (heads, width))
    down = mix @ basis.conj().t() @ root / heads**0.5
    turn = nearest_orthogonal(up.mean(0))
    return up @ turn.conj().t(), turn @ down


def _roots(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of the block-diagonal cost, and its inverse; weights floored at `FLOOR`."""
    values, vectors = torch.linalg.eigh((cost + cost.mH) / 2)
    most = float(values.max())
    size = values.clamp_min(FLOOR * most).sqrt() if most > 0 else torch.ones_like(values)
    size = size.to(cost.dtype)[:, None]
    root, inverse = (vectors * size) @ vectors.mH, (vectors / size) @ vectors.mH
    return torch.block_diag(*root), torch.block_diag(*inverse)


def _turned(moment: Tensor, start: Tensor) -> Tensor:
    """Orthogonal maps U_g that bring the heads U_g^H y_g closest to each other (Procrustes)."""
    heads, width = start.shape[:2]
    up = start
    for _ in range(ROUNDS):
        before = up
        towards = (moment @ up.flatten(0, 1)).unflatten(0, (heads, width))
        up = torch.stack([nearest_orthogonal(t) for t in towards])
        if float((up - before).abs().max()) < 1e-14:
            break
    return up @ nearest_orthogonal(up.mean(0)).conj().t()


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal (unitary) factor of the polar decomposition."""
    left, _, right = torch.linalg.svd(matrix)
    found: Tensor = left @ right
    return found
