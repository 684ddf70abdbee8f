"""The row of a latent that keeps its size alike from token to token."""

from __future__ import annotations

import torch
from test_mla import HIDDEN, config, dense

from reattend.mixers.base import Context
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.mla_latent import Latent
from reattend.passes.rewrite.mla_norm import MOST, Sizes, ballast_energy, cut_normed
from reattend.statistics import SiteStatistics


def spread(down: torch.Tensor, row: torch.Tensor, energy: float, y: torch.Tensor) -> float:
    """Variance / mean^2 of |down y|^2 + energy (row . y)^2 over tokens."""
    size = (y @ down.t()).square().sum(-1) + energy * (y @ row).square()
    return float(size.var() / size.mean() ** 2)


def test_the_ballast_is_as_large_as_measured_best() -> None:
    torch.manual_seed(0)
    mix = torch.randn(6, 6, dtype=torch.float64)
    y = torch.randn(200_000, 6, dtype=torch.float64) @ mix + torch.randn(6, dtype=torch.float64)
    moment, mean = y.t() @ y / len(y), y.mean(0)
    down = torch.randn(3, 6, dtype=torch.float64)
    row = torch.linalg.solve(moment, mean)
    row = row / (row @ moment @ row).sqrt()
    best = ballast_energy(down, row, moment, mean)
    found = spread(down, row, best, y)
    assert found < 0.9 * spread(down, row, 0.0, y)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert spread(down, row, factor * best, y) >= found - 1e-4
    assert best < MOST * float((y @ down.t()).square().sum(-1).mean())


def test_without_any_constant_there_is_no_ballast() -> None:
    torch.manual_seed(1)
    down = torch.linalg.qr(torch.randn(6, 4, dtype=torch.float64))[0].t()
    row = down[0]  # as variable as the latent itself: it would only add variance
    assert ballast_energy(down, row, torch.eye(6).double(), torch.zeros(6).double()) < 1e-12


def latent(energy: list[float]) -> Latent:
    """Rows of the identity, of these shares of the energy."""
    eye, size = torch.eye(len(energy)).double(), len(energy)
    return Latent(eye, eye[: size // 2], eye[size // 2 :], torch.zeros(size), tuple(energy), 1.0)


def statistics(mean: float) -> SiteStatistics:
    """Six unit normals around this mean."""
    centre = torch.full((6,), mean, dtype=torch.float64)
    gram = torch.eye(6).double() + torch.outer(centre, centre)
    return SiteStatistics(gram, centre, None, 1)


def test_a_row_is_spent_only_where_that_loses_less() -> None:
    even = latent([1 / 6] * 6)
    steep = latent([0.6, 0.2, 0.19, 0.0099, 0.0001, 0.0])
    constant = statistics(5.0)
    assert cut_normed(even, 5, constant).rows == 5  # the fifth row holds a sixth of everything
    assert cut_normed(steep, 5, constant).rows == 4  # here it holds nothing
    assert cut_normed(steep, 5, statistics(0.0)).rows == 5  # nothing is constant
    assert cut_normed(steep, 1, constant).rows == 1  # no row to spare


def test_sizes_are_those_of_normal_tokens() -> None:
    torch.manual_seed(3)
    y = torch.randn(400_000, 6, dtype=torch.float64) + 0.7
    down = torch.randn(3, 6, dtype=torch.float64)
    found, measured = Sizes.of(down, statistics(0.7)), (y @ down.t()).square().sum(-1)
    assert abs(found.mean / float(measured.mean()) - 1) < 0.01
    assert abs(found.variance / float(measured.var()) - 1) < 0.03


def test_sizes_differ_less_between_tokens() -> None:
    torch.manual_seed(2)
    original = dense(config())
    x = torch.randn(64, 30, HIDDEN, dtype=torch.float64) + 2 * torch.randn(HIDDEN).double()
    x[..., 6:] *= 1e-3  # so that the last rows hold next to nothing
    found = SiteStatistics.empty(original, {"attention"})
    with torch.no_grad():
        found.add(original, x, None, torch.ones(x.shape[:2]))
    deviation = {}
    for norm, rank in (("none", 11), ("rms", 12)):
        options = MlaOptions(kv_lora_rank=rank, qk_rope_head_dim=8, latent_norm=norm)
        mixer = ToMla().build(original, found, options).mixer
        with torch.no_grad():
            latent = mixer.kv_a_proj_with_mqa(x)[..., :rank]
            size = latent.square().mean(-1).sqrt()
            deviation[norm] = float(size.std() / size.mean())
            assert mixer(x, Context()).isfinite().all()
    assert deviation["rms"] < 0.7 * deviation["none"]
    assert abs(float(size.square().mean()) - 1) < 0.05
