"""Operations in place become their twins only where nobody can see the change by another name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.passes.evaluate import Evaluator
from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.inplace import ToFunctional

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(8))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.table)


def passed(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[fx.GraphModule, list[str]]:
    gm = torch.export.export(Holder(function), (X.clone(),), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    result = ToFunctional()(gm)
    assert torch.equal(gm(X.clone()), Holder(function)(X.clone()))
    return gm, [reason for _, reason in result.refused]


def test_later_readers_read_the_twin() -> None:
    def function(x: Tensor, _table: Tensor) -> Tensor:
        y = x * 2
        y.clamp_(-0.5, 0.5).add_(1.0)  # neither result is named
        return y.exp()

    gm, refused = passed(function)
    assert refused == [] and not [n for n in gm.graph.nodes if is_op(n, aten.clamp_, aten.add_)]
    (exp,) = (n for n in gm.graph.nodes if is_op(n, aten.exp))
    (mul,) = (n for n in gm.graph.nodes if is_op(n, aten.mul))
    big = Evaluator(gm).run([exp], {mul: torch.full_like(X, 9.0)})[0]
    assert torch.equal(big, torch.full_like(X, 1.5).exp())


def _input(x: Tensor, _table: Tensor) -> Tensor:
    return x.mul_(2.0) + 1.0


def _view(x: Tensor, _table: Tensor) -> Tensor:
    y = x * 2
    y[:, 0].clamp_(-0.5, 0.5)
    return y + 1.0


def _under_a_view(x: Tensor, _table: Tensor) -> Tensor:
    y = x * 2
    first = y[:, 0]
    y.clamp_(-0.5, 0.5)
    return first + 1.0


def _stored(x: Tensor, table: Tensor) -> Tensor:
    table.add_(1.0)
    return x * table


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (_input, "an input or a stored tensor"),
        (_stored, "an input or a stored tensor"),
        (_view, "a view of a tensor that others read"),
        (_under_a_view, "under a view of it"),
    ],
)
def test_what_others_see_is_left_alone(
    function: Callable[[Tensor, Tensor], Tensor], why: str
) -> None:
    (refused,) = passed(function)[1]
    assert why in refused
