"""Mixing the heads of a frequency: exact, and each kind best at what it optimises."""

from __future__ import annotations

import itertools

import pytest
import torch
from mla_blocks import config, dense, moments

from reattend.passes.rewrite.mla_mixing import components, hermitian
from reattend.passes.rewrite.mla_moments import key_moment
from reattend.passes.rewrite.mla_phase import stand_in
from reattend.passes.rewrite.mla_select import query_energy

CONFIG = config(8, 4, pairs=3, width=8)
KINDS = ("none", "real", "complex", "balanced")


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    mixer = dense(CONFIG)
    found = moments(mixer)
    keys = key_moment(mixer, found, weighted=True)
    return keys, query_energy(CONFIG, found, 3), stand_in(CONFIG, found, "mean")


def mixed(measured, kind):
    keys, energy, phase = measured
    return components(CONFIG, keys, energy, phase, kind)


def per_frequency(found, f):
    return [c for c in found if c.frequency == f]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_inverts_encoding(measured, kind) -> None:
    """Hence, with a rotation being one phase for all heads, nothing is lost if all turn."""
    for f in range(3):
        parts = per_frequency(mixed(measured, kind), f)
        whole = sum(torch.outer(c.decode, c.encode) for c in parts)
        assert torch.allclose(whole, torch.eye(4, dtype=whole.dtype), atol=1e-12)


def test_the_moment_is_that_of_complex_keys() -> None:
    samples = torch.randn(50, 4, 8, dtype=torch.float64)
    flat = samples.flatten(1)
    for f in range(3):
        z = torch.complex(samples[..., f], samples[..., 3 + f])
        expected = torch.einsum("ng,nh->gh", z, z.conj()) / 50
        assert torch.allclose(hermitian(CONFIG, flat.t() @ flat / 50, f), expected, atol=1e-12)


def test_real_mixing_is_real_and_orthogonal(measured) -> None:
    for c in mixed(measured, "real"):
        assert float(c.encode.imag.abs().max()) < 1e-12
        assert torch.allclose(c.decode, c.encode.conj(), atol=1e-12)


def test_components_are_uncorrelated_where_mixing_is_complex(measured) -> None:
    keys = measured[0]
    for kind, f in itertools.product(("complex", "balanced"), range(3)):
        encode = torch.stack([c.encode for c in per_frequency(mixed(measured, kind), f)])
        moment = encode @ hermitian(CONFIG, keys, f) @ encode.conj().t()
        off = moment - torch.diag(torch.diagonal(moment))
        assert float(off.abs().max()) < 1e-10 * float(moment.abs().max())


def test_lost_is_the_expected_squared_score_error(measured) -> None:
    """Written out: heads, their energy, what the stand-in leaves, the component's energy."""
    keys, energy, phase = measured
    for c in mixed(measured, "balanced"):
        moment = hermitian(CONFIG, keys, c.frequency)
        strength = float((c.encode @ moment @ c.encode.conj()).real)
        expected = sum(
            0.5
            * float(energy[h, c.frequency] * phase.lost[h, c.frequency])
            * float(c.decode[h // 2].abs() ** 2)
            * strength
            for h in range(8)
        )
        assert c.lost == pytest.approx(expected, rel=1e-9)


def residual(measured, kind, f, kept):
    """Score error of the best stand-in for all but the kept components of a frequency."""
    keys, energy, phase = measured
    parts = per_frequency(mixed(measured, kind), f)
    weight = (energy * phase.lost / 2).reshape(4, 2, 3).sum(1)[:, f]
    rest = sum(torch.outer(c.decode, c.encode) for c in parts[kept:])
    moment = rest @ hermitian(CONFIG, keys, f) @ rest.conj().t()
    return float((torch.diagonal(moment).real * weight).sum())


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_balanced_mixing_loses_least(measured, kept) -> None:
    """The optimum of a weighted PCA: no other mixing keeps the scores better."""
    for f in range(3):
        errors = {kind: residual(measured, kind, f, kept) for kind in KINDS}
        assert errors["balanced"] <= min(errors.values()) * (1 + 1e-9)
        parts = per_frequency(mixed(measured, "balanced"), f)
        assert errors["balanced"] == pytest.approx(sum(c.lost for c in parts[kept:]), rel=1e-6)


def test_complex_mixing_keeps_no_less_energy_than_real(measured) -> None:
    for f, kept in itertools.product(range(3), (1, 2, 3)):
        energy = {
            kind: sum(c.energy for c in per_frequency(mixed(measured, kind), f)[:kept])
            for kind in ("real", "complex")
        }
        assert energy["complex"] >= energy["real"] * (1 - 1e-12)


def test_places_are_ordered_by_strength(measured) -> None:
    for kind in ("real", "complex"):
        for f in range(3):
            energy = [c.energy for c in per_frequency(mixed(measured, kind), f)]
            assert energy == sorted(energy, reverse=True)
