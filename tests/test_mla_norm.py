"""The row of a latent that keeps its size alike from token to token."""

from __future__ import annotations

import torch
from test_mla import HIDDEN, config, dense

from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.latent import LatentAttention
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.mla_norm import MOST, ballast_energy
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


def built(x: torch.Tensor, rank: int) -> tuple[LatentAttention, DenseAttention]:
    """A block converted under a norm, its statistics from x."""
    original = dense(config())
    found = SiteStatistics.empty(original, {"attention", "sample"})
    with torch.no_grad():
        found.add(original, x, None, torch.ones(x.shape[:2]))
    options = MlaOptions(kv_lora_rank=rank, qk_rope_head_dim=8, latent_norm="rms")
    return ToMla().build(original, found, options).mixer, original


def has_ballast(mixer: LatentAttention) -> bool:
    """Whether nobody reads the last row."""
    return float(mixer.kv_b_proj.weight.detach()[:, -1].abs().max()) == 0.0


def test_a_row_is_spent_only_where_that_loses_less() -> None:
    torch.manual_seed(2)
    constant = 2 * torch.randn(HIDDEN).double()
    few = torch.randn(4, 50, HIDDEN, dtype=torch.float64)
    few[..., 6:] *= 1e-3  # the last rows of the latent hold next to nothing
    assert has_ballast(built(few + constant, 12)[0])
    many = torch.randn(4, 50, HIDDEN, dtype=torch.float64)
    assert not has_ballast(built(many, 3)[0])  # nothing is constant, and every row counts
    assert not has_ballast(built(many, 1)[0])  # no row to spare


def test_sizes_differ_less_between_tokens() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 500, HIDDEN, dtype=torch.float64) + 2 * torch.randn(HIDDEN).double()
    x[..., 6:] *= 1e-3
    mixer, original = built(x, 12)
    with torch.no_grad():
        latent = mixer.kv_a_proj_with_mqa(x)[..., :12]
        own, steadied = (r.square().sum(-1).sqrt() for r in (latent[..., :11], latent))
        assert mixer(x, Context()).isfinite().all()
    assert float(steadied.std() / steadied.mean()) < 0.8 * float(own.std() / own.mean())
    assert abs(float(latent.square().mean()) - 1) < 0.05  # the norm's eps is small beside that
