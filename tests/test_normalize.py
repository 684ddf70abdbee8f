"""Each normalising pass on a graph of about ten nodes, with what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from normal_graphs import Holder, X, calls, graph, refusals
from torch import Tensor

from reattend.passes.evaluate import Evaluator
from reattend.passes.normalize.forms import aten, attention, is_op, rms_norm
from reattend.passes.normalize.sinks import ZERO


class TestLinear:
    def test_addmm_on_a_flat_view(self) -> None:
        def conv1d(m: Holder, x: Tensor) -> Tensor:
            y = torch.addmm(m.bias, x.view(-1, 8), m.weight.t())
            return y.view(2, 5, 12)

        gm, _ = graph(conv1d, X)
        assert len(calls(gm, aten.linear)) == 1
        assert not calls(gm, aten.addmm)
        assert calls(gm, aten.linear)[0].meta["val"].shape == (2, 5, 12)

    def test_matmul_with_a_weight(self) -> None:
        gm, _ = graph(lambda m, x: x @ m.weight.T, X)
        assert len(calls(gm, aten.linear)) == 1

    def test_matmul_of_two_activations_stays(self) -> None:
        gm, _ = graph(lambda _m, x: x @ x.transpose(1, 2), X)
        assert not calls(gm, aten.linear)

    def test_scaled_addmm_stays(self) -> None:
        gm, _ = graph(lambda m, x: torch.addmm(m.bias, x[0], m.weight.t(), alpha=2.0), X)
        assert not calls(gm, aten.linear)


class TestInPlace:
    def test_later_readers_see_the_change(self) -> None:
        def clipped(m: Holder, x: Tensor) -> Tensor:
            y = x @ m.weight.t()
            y.clamp_(-0.5, 0.5)  # the result is not named
            return y + 1.0

        gm, _ = graph(clipped, X)
        (clamp,) = calls(gm, aten.clamp)
        linear = calls(gm, aten.linear)[0]
        add = calls(gm, aten.add)[0]
        given = {linear: torch.full((2, 5, 12), 3.0)}
        assert clamp.args[0] is linear
        assert bool((Evaluator(gm).run([add], given)[0] == 1.5).all())
        assert bool((given[linear] == 3.0).all())


class TestRmsNorm:
    @pytest.mark.parametrize(
        "spelling",
        [
            lambda m, x: m.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
            lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * m.gain,
            lambda m, x: (1.0 + m.gain) * (x * torch.rsqrt(x.square().mean(-1, True) + 1e-6)),
        ],
    )
    def test_spellings(self, spelling: Callable[..., Tensor]) -> None:
        gm, _ = graph(spelling, X)
        (node,) = calls(gm, rms_norm)
        assert node.args[1] is not None
        assert node.args[2] == pytest.approx(1e-6)

    def test_a_mean_over_another_axis_stays(self) -> None:
        gm, _ = graph(lambda _m, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), X)
        assert not calls(gm, rms_norm)

    def test_a_cube_stays(self) -> None:
        gm, _ = graph(lambda _m, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, True) + 1e-6), X)
        assert not calls(gm, rms_norm)


Q, K, V = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in (2, 3, 4))
CAUSAL = torch.ones(5, 5).tril().bool()
ALIBI = torch.arange(5.0) * torch.tensor([1.0, 0.5, 0.25])[:, None, None]


def eager(scores: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores, -1) @ v


def _baddbmm(m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bloom: the bias, the product and the scale in one call, heads in the batch."""
    slopes = m.gain[:3].repeat(2)[:, None, None] * torch.arange(5)
    q, k, v = q.reshape(6, 5, 4), k.reshape(6, 5, 4), v.reshape(6, 5, 4)
    scores = torch.baddbmm(slopes, q, k.transpose(1, 2), beta=0.5, alpha=0.25).view(2, 3, 5, 5)
    probs = F.softmax(scores + torch.where(CAUSAL, 0.0, -1e9), -1)
    return torch.bmm(probs.view(6, 5, 5), v).view(2, 3, 5, 4)


def _three_axes(_m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """OPT and XGLM as they were: softmax over [B H, N, M], the mask added in between."""
    q, k, v = q.reshape(6, 5, 4), k.reshape(6, 5, 4), v.reshape(6, 5, 4)
    scores = torch.bmm(q, k.transpose(1, 2)).view(2, 3, 5, 5) + torch.where(CAUSAL, 0.0, -1e9)
    scores = torch.maximum(scores, torch.tensor(torch.finfo(torch.float32).min)).view(6, 5, 5)
    return torch.bmm(F.softmax(scores, -1), v).view(2, 3, 5, 4)


FOLDED = [
    _baddbmm,
    _three_axes,
    lambda _m, q, k, v: torch.bmm(
        F.softmax(q @ k.mT, -1).reshape(6, 5, 5), v.reshape(6, 5, 4)
    ).reshape(2, 3, 5, 4),
]


class TestCores:
    def test_sdpa_with_its_default_scale(self) -> None:
        gm, _ = graph(lambda _m, q, k, v: F.scaled_dot_product_attention(q, k, v), Q, K, V)
        (node,) = calls(gm, attention)
        assert node.args[4] == pytest.approx(0.5)

    def test_grouped_sdpa_repeats_its_heads(self) -> None:
        def grouped(_m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        gm, _ = graph(grouped, torch.randn(2, 6, 5, 4), K, V)
        (node,) = calls(gm, attention)
        assert node.args[6] is True

    @pytest.mark.parametrize(
        ("spelling", "scale", "softcap"),
        [
            (lambda q, k, v: eager(q @ k.transpose(2, 3) * 0.25, v), 0.25, 0.0),
            (lambda q, k, v: eager(q @ k.transpose(2, 3) / 4.0, v), 0.25, 0.0),
            (lambda q, k, v: eager(torch.tanh(q @ k.mT * 0.5 / 7.0) * 7.0, v), 0.5, 7.0),
            (lambda q, k, v: eager((q @ k.mT).masked_fill(~CAUSAL, -1e9), v), 1.0, 0.0),
            (lambda q, k, v: eager(torch.where(CAUSAL, q @ k.mT, -1e9), v), 1.0, 0.0),
            (lambda q, k, v: eager(-1e9 * ~CAUSAL + 2.0 * (q @ k.mT), v), 2.0, 0.0),
            (lambda q, k, v: eager((q @ k.mT + ALIBI - 1e9 * ~CAUSAL) / 4.0, v), 0.25, 0.0),
            (lambda q, k, v: eager(q @ k.mT * 2.0 + torch.where(CAUSAL, 0.0, -1e9), v), 2.0, 0.0),
        ],
    )
    def test_eager_spellings(
        self, spelling: Callable[..., Tensor], scale: float, softcap: float
    ) -> None:
        gm, _ = graph(lambda _m, q, k, v: spelling(q, k, v), Q, K, V)
        (node,) = calls(gm, attention)
        assert node.args[4] == pytest.approx(scale)
        assert node.args[5] == pytest.approx(softcap)

    def test_softmax_over_queries_is_refused(self) -> None:
        gm, _ = graph(lambda _m, q, k, v: F.softmax(q @ k.mT, 2) @ v, Q, K, V)
        assert not calls(gm, attention)

    def test_a_router_is_not_attention(self) -> None:
        gm, _ = graph(lambda m, x: F.softmax(x @ m.weight.t(), -1) @ m.weight, X)
        assert not calls(gm, attention)

    @pytest.mark.parametrize("spelling", FOLDED)
    def test_heads_folded_into_the_batch(self, spelling: Callable[..., Tensor]) -> None:
        gm, _ = graph(lambda m, q, k, v: spelling(m, q, k, v), Q, K, V)
        (node,) = calls(gm, attention)
        assert node.args[0].meta["val"].shape == Q.shape  # type: ignore[union-attr]

    def test_sinks(self) -> None:
        def sinks(m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gain = m.gain if m.gain.numel() == 3 else m.gain[:3]
            column = gain.reshape(1, -1, 1, 1).expand(2, -1, 5, -1)
            scores = torch.cat([q @ k.mT * 0.5 + torch.where(CAUSAL, 0.0, -1e9), column], -1)
            scores = scores - scores.max(-1, keepdim=True).values
            return F.softmax(scores, -1)[..., :-1] @ v

        gm, _ = graph(lambda m, q, k, v: sinks(m, q, k, v), Q, K, V)
        (node,) = calls(gm, attention)  # a part of a weight is no stored vector
        assert str(node.args[7].target).startswith(ZERO)  # type: ignore[union-attr]
        gm, _ = graph(lambda m, q, k, v: sinks(m, q, k, v), Q, K, V, gain=3)
        (node,) = calls(gm, attention)
        assert str(node.args[7].target) == "gain"  # type: ignore[union-attr]

    def test_a_factor_per_head_moves_to_the_queries(self) -> None:
        def cosine(m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            return eager(q @ k.mT * m.gain.clamp(max=2.0).exp()[:, None, None], v)

        gm, _ = graph(cosine, Q, K, V, gain=3)
        (node,) = calls(gm, attention)
        assert is_op(node.args[0], aten.mul)

    @pytest.mark.parametrize(
        "spelling",
        [
            lambda q, k, v: F.softmax(q @ k.mT, -1).transpose(2, 3) @ v,
            lambda q, k, v: F.softmax(q @ k.mT, -1)[..., :-1] @ v[:, :, 1:],
            lambda q, k, v: F.softmax(q @ k.mT, -1).reshape(2, 5, 3, 5).view(2, 3, 5, 5) @ v,
            lambda q, k, v: eager((q @ k.mT).transpose(1, 2).reshape(2, 3, 5, 5), v),
        ],
    )
    def test_rearranged_scores_are_refused_not_overlooked(
        self, spelling: Callable[..., Tensor]
    ) -> None:
        assert refusals(lambda _m, q, k, v: spelling(q, k, v), Q, K, V)

    def test_probabilities_are_cleared_only_where_scores_were_hidden(self) -> None:
        late = torch.ones(5, 5, dtype=torch.bool).triu(1)

        def cleared(where: Tensor) -> Callable[..., Tensor]:
            def spelled(_m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                scores = (q @ k.mT).masked_fill(late == torch.tensor(True), float("-inf"))
                return F.softmax(scores, -1).masked_fill(where == torch.tensor(True), 0.0) @ v

            return spelled

        gm, _ = graph(cleared(late), Q, K, V)
        assert len(calls(gm, attention)) == 1
        assert "not hidden" in refusals(cleared(late.flip(0)), Q, K, V)

    def test_two_kinds_of_keys_under_one_softmax_are_named(self) -> None:
        def beside(_m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = torch.cat([q @ k.mT, q @ k.flip(2).mT], -1) + torch.ones(10)
            return F.softmax(scores, -1) @ torch.cat([v, v], 2)

        assert "several products share one softmax (cat" in refusals(beside, Q, K, V)

    def test_something_between_product_and_softmax_is_refused(self) -> None:
        gm, _ = graph(lambda _m, q, k, v: eager(torch.relu(q @ k.mT), v), Q, K, V)
        assert not calls(gm, attention)
