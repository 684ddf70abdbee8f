"""Each normalising pass on a graph of about ten nodes, with what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from reattend.passes.evaluate import Evaluator
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import aten, attention, is_op, rms_norm

WEIGHT = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.bias = nn.Parameter(torch.rand(12))
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def graph(function: Callable[..., Tensor], *args: Tensor) -> tuple[fx.GraphModule, Tensor]:
    """A normalised graph, after checking that it still computes the same."""
    module = Holder(function).eval()
    gm = torch.export.export(module, args, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    expected = module(*args)
    normalize(gm)
    got = gm(*args)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    return gm, got


def calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_op(n, target)]


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


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


def eager(scores: Tensor, v: Tensor) -> Tensor:
    return F.softmax(scores, -1) @ v


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

    def test_reshaped_probabilities_are_refused_not_overlooked(self) -> None:
        """Bloom's spelling: heads folded into the batch for the second product."""

        def folded(_m: Holder, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            probs = F.softmax(q @ k.mT, -1).reshape(6, 5, 5)
            return torch.bmm(probs, v.reshape(6, 5, 4))

        module = Holder(folded).eval()
        gm = torch.export.export(module, (Q, K, V), strict=False).module()
        assert isinstance(gm, fx.GraphModule)
        refused = {r.name: r.refused for r in normalize(gm)}["fuse-eager"]
        assert len(refused) == 1
        assert "reshaped" in refused[0][1]

    def test_something_between_product_and_softmax_is_refused(self) -> None:
        gm, _ = graph(lambda _m, q, k, v: eager(torch.relu(q @ k.mT), v), Q, K, V)
        assert not calls(gm, attention)


def test_evaluator_runs_only_what_is_needed() -> None:
    gm, _ = graph(lambda m, x: (x @ m.weight.t()).relu() + m.bias, X)
    relu = calls(gm, aten.relu)[0]
    linear = calls(gm, aten.linear)[0]
    value = torch.full((2, 5, 12), -1.0)
    assert bool((Evaluator(gm).run([relu], {linear: value})[0] == 0).all())
    with pytest.raises(KeyError, match="needed here"):
        Evaluator(gm).run([relu], {})


def test_promotion_reaches_weights_and_casts() -> None:
    gm, _ = graph(lambda m, x: (x @ m.weight.t()).to(torch.float32).softmax(-1), X)
    last = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    given = {next(n for n in gm.graph.nodes if n.op == "placeholder"): X}
    assert Evaluator(gm, promote=torch.float64).run([last], given)[0].dtype == torch.float64
