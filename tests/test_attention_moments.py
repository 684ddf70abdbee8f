"""Moments weighted by what scores cost, against loops over tokens."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from mla_blocks import HIDDEN, config, dense

from reattend.attention_moments import (
    SENSITIVE,
    AttentionMoments,
    diagonal_sums,
    read_out,
    sensitivity,
)
from reattend.statistics import SiteStatistics


def collected(mixer, x, valid=None):
    found = SiteStatistics.empty(mixer, {"attention"})
    with torch.no_grad():
        found.add(mixer, x, None, valid)
    return found


def weights(mixer, x_ND):
    """Weight of query i on key j for every head, and queries, written out."""
    core, rotary = mixer.config.core, mixer.config.rotary
    pairs = rotary.pairs if rotary else 0
    with torch.no_grad():
        q = mixer.q_proj(x_ND).unflatten(-1, (core.heads, core.qk_head_dim))
        k = mixer.k_proj(x_ND).unflatten(-1, (core.kv_heads, core.qk_head_dim))
        if mixer.q_norm is not None:
            q, k = mixer.q_norm(q), mixer.k_norm(k)

    def turned(z, position):
        z = z.clone()
        for f in range(pairs):
            pair = complex(z[f], z[pairs + f]) * cmath.exp(1j * position * rotary.inv_freq[f])
            z[f], z[pairs + f] = pair.real, pair.imag
        return z

    n = len(x_ND)
    e = core.v_head_dim
    v = (x_ND @ mixer.v_proj.weight.detach().t()).unflatten(-1, (core.kv_heads, e))
    found = torch.zeros(core.heads, n, n, dtype=torch.float64)
    sees = {}
    for h in range(core.heads):
        out = mixer.o_proj.weight.detach()[:, h * e : (h + 1) * e]
        g = h // (core.heads // core.kv_heads)
        for i in range(n):
            sees[i] = seen = [j for j in range(i + 1) if not core.window or j > i - core.window]
            scores = []
            for j in seen:
                s = float(turned(q[i, h], i) @ turned(k[j, g], j)) * core.scale
                scores.append(core.softcap * math.tanh(s / core.softcap) if core.softcap else s)
            top = max(scores)
            total = sum(math.exp(s - top) for s in scores)
            p = [math.exp(s - top) / total for s in scores]
            mean = sum(a * v[j, g] for a, j in zip(p, seen, strict=True))
            for a, j in zip(p, seen, strict=True):
                found[h, i, j] = float((a * out @ (v[j, g] - mean)).square().sum())
        share = (1 - SENSITIVE) * float(found[h].sum()) / n
        found[h] *= SENSITIVE
        for i in range(n):
            found[h, i, sees[i]] += share / len(sees[i])
    return found, q


@pytest.mark.parametrize(
    "cfg",
    [config(), config(bias=True), config(norm=True), config(softcap=2.0), config(window=3)],
    ids=["plain", "bias", "norm", "softcap", "window"],
)
def test_sums_are_those_of_the_loops(cfg) -> None:
    mixer = dense(cfg)
    x = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    found = collected(mixer, x).attention
    expected = AttentionMoments.empty(mixer)
    for row in x:
        weight, q = weights(mixer, row)
        y = torch.cat([row @ mixer.k_proj.weight.t(), row @ mixer.v_proj.weight.t()], -1).detach()
        if mixer.k_norm is not None:
            k = mixer.k_norm(mixer.k_proj(row).unflatten(-1, (2, 8))).flatten(1)
            y = torch.cat([k, row @ mixer.v_proj.weight.t()], -1).detach()
        for i in range(6):
            for j in range(6):
                w = weight[:, i, j]
                expected.gram += w.mean() * torch.outer(y[j], y[j])
                expected.total += w.mean() * y[j]
                expected.weight += w.mean()
                expected.head_weight += w
                expected.queries += torch.einsum("h,hi,hj->hij", w, q[i], q[i])
                for f, speed in enumerate(cfg.rotary.inv_freq):
                    expected.phases[:, f, 0] += w * math.cos((i - j) * speed)
                    expected.phases[:, f, 1] += w * math.sin((i - j) * speed)
    for name in ("gram", "total", "weight", "queries", "phases", "head_weight"):
        a, b = getattr(found, name), getattr(expected, name)
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), name


def test_the_weight_is_what_an_error_of_the_score_costs() -> None:
    """By pushing one score after the other a little."""
    mixer = dense(config())
    scores, v = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    seen = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    out = mixer.o_proj.weight.detach().unflatten(1, (4, 8))[:, :2]

    def output(given):
        p = given.masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("hij,je,dhe->hid", p, v, out)

    found = sensitivity(scores, seen, v, read_out(mixer)[:2])
    for h in range(2):
        costs = torch.zeros(5, 5, dtype=torch.float64)
        for i in range(5):
            for j in range(i + 1):
                push = torch.zeros_like(scores)
                push[h, i, j] = 1e-5
                costs[i, j] = (
                    ((output(scores + push) - output(scores - push)) / 2e-5).square().sum()
                )
        even = seen[0] / seen[0].sum(-1, keepdim=True)
        expected = SENSITIVE * costs + (1 - SENSITIVE) * costs.sum() / 5 * even
        assert torch.allclose(found[h], expected, rtol=1e-6, atol=1e-9)


def test_padding_counts_nowhere() -> None:
    mixer = dense(config())
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    valid = torch.ones(2, 9)
    valid[0, :4] = 0
    padded = collected(mixer, x, valid)
    alone = collected(mixer, x[:1, 4:])
    more = collected(mixer, x[1:])
    for name, value in padded.attention.tensors().items():
        both = alone.attention.tensors()[name] + more.attention.tensors()[name]
        assert torch.allclose(value, both, atol=1e-12), name
    assert padded.count == 14


def test_the_sum_of_the_weights_is_kept() -> None:
    """So that the moments become means."""
    mixer = dense(config(4, 4))
    x = torch.randn(3, 8, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1.0
    mixer.v_proj.weight.data[0] = 0
    mixer.v_proj.weight.data[0, 0] = 1.0  # the first value of every token is 1
    found = collected(mixer, x).attention
    assert float(found.total[32]) == pytest.approx(float(found.weight))
    assert float(found.head_weight.mean()) == pytest.approx(float(found.weight))


def test_diagonals_are_ordered_by_distance() -> None:
    weight = torch.arange(9.0).reshape(1, 3, 3)
    assert diagonal_sums(weight).tolist() == [[2.0, 1 + 5.0, 0 + 4 + 8.0, 3 + 7.0, 6.0]]


def test_storage_round_trips() -> None:
    mixer = dense(config())
    found = SiteStatistics.empty(mixer, {"attention", "inputs", "sample"})
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        found.add(mixer, x, None, None)
    back = SiteStatistics.from_tensors(found.tensors())
    for name, value in found.tensors().items():
        assert torch.equal(back.tensors()[name], value)
    assert torch.equal(back.samples[1], x[1])
    assert torch.allclose(back.input_gram, x.flatten(0, 1).t() @ x.flatten(0, 1))
