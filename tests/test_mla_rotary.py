"""The selection of rotated components, apart from everything else."""

from __future__ import annotations

import pytest
import torch
from mla_blocks import config

from reattend.passes.rewrite.mla_rotary import select_real, slot_columns, smallest_fold


def gram(width: int) -> torch.Tensor:
    samples = torch.randn(200, width, dtype=torch.float64) * torch.linspace(1, 3, width)
    return samples.t() @ samples


def test_the_maps_are_an_orthonormal_change_of_basis() -> None:
    cfg = config(4, 4, width=12)
    choice = select_real(cfg, gram(48), 8, 1)
    whole = torch.cat([choice.key_rope, choice.key_nope])
    assert torch.allclose(whole @ whole.t(), torch.eye(48, dtype=torch.float64), atol=1e-12)
    assert torch.equal(choice.nope_up, choice.key_nope.t())


def test_heads_mix_within_a_frequency_only_and_alike_for_both_parts() -> None:
    cfg = config(4, 4, pairs=4, width=8)
    choice = select_real(cfg, gram(32), 8, 1)
    slots = len(choice.columns)
    for slot, frequency in enumerate(choice.columns):
        real = choice.key_rope[slot].reshape(4, 8)
        imaginary = choice.key_rope[slots + slot].reshape(4, 8)
        assert torch.equal(real[:, frequency], imaginary[:, 4 + frequency])
        assert int((real != 0).any(0).sum()) == 1


def test_the_strongest_components_are_kept() -> None:
    cfg = config(4, 4, pairs=4, width=8)
    moment = gram(32)
    choice = select_real(cfg, moment, 8, 1)
    kept = torch.einsum("ry,yz,rz->r", choice.key_rope, moment, choice.key_rope)
    energy = kept[:4] + kept[4:]
    assert torch.allclose(energy / moment.diagonal().sum(), torch.tensor(choice.energy).double())
    rest = torch.einsum("ry,yz,rz->r", choice.key_nope, moment, choice.key_nope)
    per_component = rest.reshape(-1, 2).sum(1).reshape(4, 3)
    assert bool((energy[:, None] >= per_component - 1e-9).all())


@pytest.mark.parametrize(
    ("pairs", "slots", "fold", "columns"),
    [
        (4, 4, 1, (0, 1, 2, 3)),
        (4, 8, 1, (0, 0, 1, 1, 2, 2, 3, 3)),
        (4, 2, 2, (0, 2)),
        (8, 4, 4, (0, 2, 4, 6)),
        (8, 2, 8, (0, 4)),
    ],
)
def test_slots_are_strided_over_bands(
    pairs: int, slots: int, fold: int, columns: tuple[int, ...]
) -> None:
    assert slot_columns(pairs, slots, fold) == columns


def test_the_smallest_fold_that_fits() -> None:
    assert smallest_fold(16, 16) == 1
    assert smallest_fold(16, 8) == 2
    assert smallest_fold(16, 4) == 4
    assert smallest_fold(16, 24) == 2
    assert smallest_fold(16, 3) == 16


def test_a_larger_fold_captures_no_less_energy() -> None:
    cfg = config(4, 4, pairs=4, width=8)
    moment = gram(32)
    shares = [sum(select_real(cfg, moment, 8, fold).energy) for fold in (1, 2, 4)]
    assert shares == sorted(shares)
