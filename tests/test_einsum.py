"""Einsums of two tensors become products; the rest are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend import find_attention
from reattend.passes.normalize.einsum import ToMatmul
from reattend.passes.normalize.forms import aten, is_op

A = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
B = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Sum(nn.Module):
    def __init__(self, equation: str, weight: Tensor | None = None) -> None:
        super().__init__()
        self.equation = equation
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(self.equation, a, b if self.weight is None else self.weight)


def rewritten(module: Sum, a: Tensor, b: Tensor) -> tuple[fx.GraphModule, Any]:
    gm: Any = torch.export.export(module, (a, b), strict=False).module()
    result = ToMatmul()(gm)
    assert torch.allclose(gm(a, b), module(a, b), rtol=1e-12, atol=1e-12)
    return gm, result


def count(gm: fx.GraphModule, target: object) -> int:
    return sum(is_op(n, target) for n in gm.graph.nodes)


@pytest.mark.parametrize(
    "equation", ["bnhd,bmhd->bhnm", "b n h d, b m h d -> b h m n", "bn...d,bm...d->b...nm"]
)
def test_scores_become_one_product(equation: str) -> None:
    gm, result = rewritten(Sum(equation), A, B)
    assert result.rewrites == 1
    assert (count(gm, aten.matmul), count(gm, aten.einsum)) == (1, 0)


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("bnhd,hdo->bno", (3, 4, 7)), ("bnhd,do->bnho", (4, 7)), ("bnhd,dxy->bnhxy", (4, 2, 3))],
)
def test_a_weight_makes_a_linear_layer(equation: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gm, result = rewritten(Sum(equation, weight), A, B)
    assert result.rewrites == 1
    assert count(gm, aten.linear) == 1


@pytest.mark.parametrize(
    ("equation", "a", "b", "why"),
    [
        ("bnhd,bmhd->bnm", A, B, "several axes"),
        ("bnhd,bmhe->bhnm", A, B, "sums one of its tensors alone"),
        ("bnhd,bnhd->bnhd", A, A, "without a sum"),
        ("bnhd,bmhd->bhnm", A, B[:1], "broadcasts an axis"),
    ],
)
def test_other_sums_stay(equation: str, a: Tensor, b: Tensor, why: str) -> None:
    gm, result = rewritten(Sum(equation), a, b)
    assert count(gm, aten.einsum) == 1
    assert why in result.refused[0][1]


class Heads(nn.Module):
    """Attention all in einsums, weights [D, H, d]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        make = lambda *s: nn.Parameter(torch.randn(*s, generator=generator) * 0.5)  # noqa: E731
        self.q, self.k, self.v, self.o = make(8, 2, 4), make(8, 2, 4), make(8, 2, 4), make(2, 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.q, self.k, self.v))
        probs = (torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5).softmax(-1)
        return torch.einsum("bnhd,hdc->bnc", torch.einsum("bhnm,bmhd->bnhd", probs, v), self.o)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), Heads()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def test_attention_in_einsums_is_found() -> None:
    found = find_attention(Around().eval(), {"x": torch.randn(2, 7, 8)})
    (site,) = found.sites
    assert not found.refused
    assert (site.path, site.spec.core.heads, site.spec.core.scale) == ("attn", 2, 0.5)
