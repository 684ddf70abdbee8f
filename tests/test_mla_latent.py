"""The latent: the optimum of what it promises to minimise, and the mean put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, config, dense, moments

from reattend.mixers.base import Context
from reattend.passes.rewrite.mla import MlaOptions, ToMla
from reattend.passes.rewrite.mla_latent import balance_factor, cost_factor, output_metric
from reattend.passes.rewrite.mla_moments import latent_moment
from reattend.passes.rewrite.mla_sizes import Sizes
from reattend.passes.rewrite.mla_solve import solve
from reattend.statistics import SiteStatistics

SIZES = Sizes(kv_lora_rank=5, qk_rope_head_dim=4, fold=1)


def cost(solved, dense_mixer, found, options, rank, change=None):
    """Expected cost of reconstruction under the output metric, written with y itself."""
    moment, _ = latent_moment(dense_mixer, found, options)
    metric = output_metric(dense_mixer, solved.rotary, found, solved.turn_Hdd)
    latent = solved.latent.cut(rank)
    down = latent.down if change is None else latent.down + change
    z = torch.zeros(28, 32, dtype=torch.float64)
    z[:12, :16], z[12:, 16:] = solved.rotary.key_nope, torch.eye(16, dtype=torch.float64)
    pinv = torch.linalg.pinv(solved.rotary.nope_up)
    back = torch.cat([pinv @ latent.key_up, latent.value_up])
    gap = z - back @ down
    error = gap @ moment @ gap.t()
    keys = float((metric.keys * error[:12, :12]).sum()) / latent.balance**2
    return keys + float((metric.values * error[12:, 12:]).sum())


def test_the_cost_is_what_the_spectrum_says_and_no_other_map_is_cheaper() -> None:
    mixer = dense(config())
    found, options = moments(mixer), MlaOptions(kv_lora_rank=5, qk_rope_head_dim=4)
    solved = solve(mixer, found, options, SIZES)
    best = cost(solved, mixer, found, options, 5)
    total = cost(solved, mixer, found, options, 0)
    assert best == pytest.approx(total * (1 - sum(solved.latent.energy[:5])), rel=1e-3)
    for seed in range(5):
        torch.manual_seed(seed)
        change = 1e-2 * torch.randn(5, 32, dtype=torch.float64)
        assert cost(solved, mixer, found, options, 5, change) > best


def test_equal_cost_is_given_to_keys_and_values() -> None:
    mixer = dense(config())
    found, options = moments(mixer), MlaOptions(kv_lora_rank=5, qk_rope_head_dim=4)
    solved = solve(mixer, found, options, SIZES)
    metric = output_metric(mixer, solved.rotary, found, solved.turn_Hdd)
    moment, _ = latent_moment(mixer, found, options)
    z = torch.block_diag(solved.rotary.key_nope, torch.eye(16, dtype=torch.float64))
    moment = z @ moment @ z.t()
    keys = float((metric.keys * moment[:12, :12]).sum()) / solved.latent.balance**2
    assert keys == pytest.approx(float((metric.values * moment[12:, 12:]).sum()))
    assert cost_factor(metric, moment, 2.0) == pytest.approx(solved.latent.balance / 2)


def test_the_metric_of_values_is_their_effect_on_the_output() -> None:
    """|W_O spread(dv)|^2 for an error in one group, by running the projection."""
    mixer = dense(config(4, 2))
    found = moments(mixer)
    solved = solve(mixer, found, MlaOptions(kv_lora_rank=5, qk_rope_head_dim=4), SIZES)
    metric = output_metric(mixer, solved.rotary, found, solved.turn_Hdd).values
    error = torch.zeros(2, 8, dtype=torch.float64)
    error[1] = torch.randn(8, dtype=torch.float64)
    expected = 0.0
    for head in (2, 3):
        alone = torch.zeros(4, 8, dtype=torch.float64)
        alone[head] = error[1]
        expected += float((mixer.o_proj.weight @ alone.flatten()).square().sum().detach())
    assert float(error.flatten() @ metric @ error.flatten()) == pytest.approx(expected)


def test_the_metric_of_keys_is_the_mean_squared_score_error() -> None:
    from test_attention_moments import weights

    mixer = dense(config(4, 2, pairs=0))
    found = SiteStatistics.empty(mixer, {"attention"})
    x = torch.randn(1, 9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        found.add(mixer, x, None, None)
        q = mixer.q_proj(x)[0].unflatten(-1, (4, 8))
    sizes = Sizes(kv_lora_rank=5, qk_rope_head_dim=0, fold=1)
    solved = solve(mixer, found, MlaOptions(kv_lora_rank=5, qk_rope_head_dim=0), sizes)
    metric = output_metric(mixer, solved.rotary, found, solved.turn_Hdd).keys
    lost = torch.randn(16, dtype=torch.float64)
    dk = (solved.rotary.nope_up @ lost).reshape(2, 8).repeat_interleave(2, 0)
    weight, _ = weights(mixer, x[0])
    lost_hn = torch.einsum("nhd,hd->hn", q, dk) ** 2
    expected = float((lost_hn * weight.sum(2)).sum() / weight.mean(0).sum())
    assert float(lost @ metric @ lost) == pytest.approx(expected)


@pytest.mark.parametrize("out", [True, False])
def test_a_constant_added_to_keys_and_values_costs_no_rank(out: bool) -> None:
    """Centred, the mean is put back exactly: an offset changes the block as it did before."""
    cfg = config(4, 4, pairs=0, out=out)
    original = dense(cfg)
    options = MlaOptions(kv_lora_rank=9, qk_rope_head_dim=0)
    x = torch.randn(2, 11, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1.0  # a constant input: its weight column is an offset
    errors = []
    for size in (0.0, 50.0):
        for name in ("k_proj", "v_proj"):
            getattr(original, name).weight.data[:, 0] = size * torch.ones(32)
        found = SiteStatistics.empty(original, {"attention"})
        with torch.no_grad():
            found.add(original, x, None, None)
            built: Any = ToMla().build(original, found, options).mixer
            errors.append(built(x, Context()) - original(x, Context()))
    assert torch.allclose(errors[0], errors[1], atol=1e-8)
    assert float(errors[0].abs().max()) > 1e-3


def test_uncentred_it_does() -> None:
    cfg = config(4, 4, pairs=0)
    original = dense(cfg)
    original.v_proj.weight.data[:, 0] = 50.0
    x = torch.randn(2, 11, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1.0
    found = SiteStatistics.empty(original, {"attention"})
    gaps = {}
    with torch.no_grad():
        found.add(original, x, None, None)
        for center in (True, False):
            options = MlaOptions(kv_lora_rank=9, qk_rope_head_dim=0, center=center)
            built: Any = ToMla().build(original, found, options).mixer
            assert ("o_proj.bias" in built.state_dict()) == center
            gaps[center] = float((built(x, Context()) - original(x, Context())).norm())
    assert gaps[True] < gaps[False]


def test_balance_equalises_mean_column_norms() -> None:
    keys, values = torch.diag(torch.tensor([16.0, 64.0])), torch.diag(torch.tensor([1.0, 9.0]))
    assert balance_factor(keys, values, 1.0) == pytest.approx(6.0 / 2.0)
    assert balance_factor(keys, values, 2.0) == pytest.approx(1.5)
    assert balance_factor(torch.zeros(2, 2), values, 1.0) == 1.0
    assert balance_factor(torch.zeros(0, 0), values, 1.0) == 1.0
