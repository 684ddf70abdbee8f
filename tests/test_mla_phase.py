"""The constant in place of a rotation: the best one, and where it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, config, dense, moments

from reattend.mixers.base import Context
from reattend.mixers.config import RotaryConfig
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.mla_phase import stand_in
from reattend.statistics import SiteStatistics


def test_the_mean_has_the_least_error() -> None:
    cfg = config(4, 2)
    found = moments(dense(cfg))
    mean, one = stand_in(cfg, found, "mean"), stand_in(cfg, found, "one")
    assert bool((mean.lost <= one.lost + 1e-12).all())
    size = torch.view_as_complex(found.attention.phases)
    size = size / found.attention.head_weight[:, None]
    for shift in (0.01, -0.02j, 0.1 + 0.1j):
        other = (
            1 - 2 * ((mean.factor + shift).conj() * size).real + (mean.factor + shift).abs() ** 2
        )
        assert bool((mean.lost < other).all())


def test_lost_is_the_mean_squared_gap_over_distances() -> None:
    """One row: the weights are known, the gap is written out."""
    cfg = config(2, 1, pairs=2)
    mixer = dense(cfg)
    found = SiteStatistics.empty(mixer, {"attention"})
    x = torch.randn(1, 6, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        found.add(mixer, x, None, None)
    from test_attention_moments import weights

    weight, _ = weights(mixer, x[0])
    distance = torch.arange(6.0)[:, None].double() - torch.arange(6.0).double()
    for kind in ("one", "mean"):
        phase = stand_in(cfg, found, kind)
        for h in range(2):
            for f, speed in enumerate(cfg.rotary.inv_freq):
                turn = torch.polar(torch.ones_like(distance), distance * speed)
                gap = (turn - phase.factor[h, f]).abs() ** 2
                expected = float((weight[h] * gap).sum() / weight[h].sum())
                assert float(phase.lost[h, f]) == pytest.approx(expected, abs=1e-9)


def test_the_scaling_of_the_table_is_kept() -> None:
    """A dropped rotation of a scaled table still multiplies queries and keys by its scaling."""
    plain = config(2, 2)
    scaled = plain.model_copy(
        update={"rotary": RotaryConfig(inv_freq=plain.rotary.inv_freq, scaling=1.5)}
    )
    found = moments(dense(plain))
    assert torch.allclose(
        stand_in(scaled, found, "one").factor, 2.25 * stand_in(plain, found, "one").factor
    )


@pytest.mark.parametrize("norm", [False, True])
def test_without_any_rotation_scores_carry_the_constant(norm: bool) -> None:
    """R = 0 at full rank: the block equals one whose keys turn by the constants alone."""
    cfg = config(2, 2, norm=norm)
    original = dense(cfg)
    found = moments(original)
    options = MlaOptions(kv_lora_rank=32, qk_rope_head_dim=0, allow_growth=True, center=False)
    built: Any = ToMla().build(original, found, options).mixer
    x = torch.randn(1, 7, HIDDEN, dtype=torch.float64)
    factor = stand_in(cfg, found, "mean").factor
    with torch.no_grad():
        q = original.q_proj(x).unflatten(-1, (2, 8))[0]
        k = original.k_proj(x).unflatten(-1, (2, 8))[0]
        if norm:
            q, k = original.q_norm(q), original.k_norm(k)
        v = original.v_proj(x).unflatten(-1, (2, 8))[0]
        q, k = (torch.complex(z[..., :4], z[..., 4:]) for z in (q, k))
        # score of query i and key j: Re conj(q) e^{-i distance theta} k, its mean over distances
        scores = torch.einsum("nhf,hf,mhf->hnm", q.conj(), factor.conj(), k).real * cfg.core.scale
        hidden = torch.ones(7, 7).triu(1).bool()
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        y = torch.einsum("hnm,mhe->nhe", probs, v).flatten(1) @ original.o_proj.weight.t()
        got = built(x, Context())[0]
    assert (got - y).abs().max() <= 1e-10 * y.abs().max()


def test_heads_of_a_group_share_the_constant_under_a_query_norm() -> None:
    cfg = config(4, 2, norm=True)
    factor = stand_in(cfg, moments(dense(cfg)), "mean").factor
    assert torch.equal(factor[0], factor[1])
    assert not torch.equal(factor[1], factor[2])
