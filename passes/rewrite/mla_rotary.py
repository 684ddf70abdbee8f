"""Which key components keep their rotation: RoRoPE with FreqFold, as TransMLA publishes it.

Meng et al., TransMLA, arXiv 2502.07864. A rotation turns frequency f of every head by the same
angle, so an orthogonal mix of heads at one frequency commutes with it; a PCA per frequency
gathers the energy in few components, and only those stay rotated. `fold` > 1 mixes adjacent
frequencies too, which is exact no longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.mixers.dense import DenseConfig


@dataclass(frozen=True)
class RotaryChoice:
    """Key components that stay rotated and the rest, as maps of the stacked key [G d].

    Attributes:
        key_rope: [R, G d], rows ordered [real slots | imaginary slots].
        query_rope: [R, G d]; its slice of group g maps that group's query heads.
        key_nope: [G d - R, G d], the components that are cached unrotated.
        nope_up: [G d, G d - R], back to the original key basis.
        columns: frequency of each of the R / 2 slots.
        energy: share of key energy in each rotated slot, in the order of the slots.
    """

    key_rope: Tensor
    query_rope: Tensor
    key_nope: Tensor
    nope_up: Tensor
    columns: tuple[int, ...]
    energy: tuple[float, ...]


def smallest_fold(pairs: int, slots: int) -> int:
    """The smallest fold for which every band keeps a whole number of slots; 0 if none does."""
    for fold in range(1, pairs + 1):
        if pairs % fold == 0 and (fold * slots) % pairs == 0 and fold * slots // pairs >= 1:
            return fold
    return 0


def slot_columns(pairs: int, slots: int, fold: int) -> tuple[int, ...]:
    """The frequency each rotary slot turns with: bands of `fold`, evenly strided within."""
    per_band = fold * slots // pairs if pairs else 0
    return tuple(
        start + (j * fold) // per_band for start in range(0, pairs, fold) for j in range(per_band)
    )


def select_real(
    config: DenseConfig, key_gram: Tensor, qk_rope_head_dim: int, fold: int
) -> RotaryChoice:
    """The published selection: real mixing, the same number of slots in every band.

    Args:
        config: the block; its keys are [G, d] with d = [P real | P imaginary | rest].
        key_gram: second moment of the stacked keys with bias, [G d, G d].
        qk_rope_head_dim: R; R / 2 slots are spread evenly over the bands.
        fold: frequencies per band.
    """
    groups, d = config.core.kv_heads, config.core.qk_head_dim
    pairs = config.rotary.pairs if config.rotary else 0
    slots = qk_rope_head_dim // 2
    total = float(torch.diagonal(key_gram).sum())
    kept_real, kept_imaginary, rest, energy = [], [], [], []
    per_band = fold * slots // pairs if pairs else 0
    for start in range(0, pairs, fold):
        band = range(start, start + fold)
        real = _members(band, groups, d, 0)
        imaginary = _members(band, groups, d, pairs)
        moment = key_gram[real][:, real] + key_gram[imaginary][:, imaginary]
        values, vectors = torch.linalg.eigh(moment)
        order = torch.argsort(values, descending=True)
        values, basis = values[order], _fixed_sign(vectors[:, order]).t()
        for j in range(groups * fold):
            rows = [_embed(basis[j], members, groups * d) for members in (real, imaginary)]
            if j < per_band:
                kept_real.append(rows[0])
                kept_imaginary.append(rows[1])
                energy.append(float(values[j]) / max(total, 1e-300))
            else:
                rest += rows
    for g in range(groups):
        for i in range(2 * pairs, d):
            row = torch.zeros(groups * d, dtype=key_gram.dtype)
            row[g * d + i] = 1.0
            rest.append(row)
    empty = torch.zeros(0, groups * d, dtype=key_gram.dtype)
    rope = torch.stack(kept_real + kept_imaginary) if kept_real else empty
    nope = torch.stack(rest) if rest else empty
    columns = slot_columns(pairs, slots, fold)
    return RotaryChoice(rope, rope, nope, nope.t(), columns, tuple(energy))


def _members(band: range, groups: int, d: int, offset: int) -> Tensor:
    """Stacked-key indices of one part of a band, all heads."""
    return torch.tensor([g * d + offset + f for f in band for g in range(groups)])


def _embed(weights: Tensor, members: Tensor, width: int) -> Tensor:
    row = torch.zeros(width, dtype=weights.dtype)
    row[members] = weights
    return row


def _fixed_sign(vectors: Tensor) -> Tensor:
    """Eigenvectors with their largest entry positive, so the choice does not depend on LAPACK."""
    largest = vectors.abs().argmax(0)
    return vectors * torch.sign(vectors[largest, torch.arange(vectors.shape[1])])
