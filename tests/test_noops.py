"""What computes nothing is erased from a graph, and what only looks like it stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.noops import DropNoops, ViewToReshape

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
EMPTY = torch.zeros(2, 5, 0)


class Holder(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * 3.0


def left(function: Callable[[Tensor], Tensor]) -> list[fx.Node]:
    """Operations that remain before the last product."""
    module = Holder(function)
    gm = torch.export.export(module, (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    DropNoops()(gm)
    assert torch.equal(gm(X), module(X))
    return [n for n in gm.graph.nodes if n.op == "call_function"][:-1]


@pytest.mark.parametrize(
    "nothing",
    [
        lambda x: x[:, :],
        lambda x: x.to(torch.float32),
        lambda x: torch.dropout(x, 0.3, False),
        lambda x: torch.dropout(x, 0.0, True),
        lambda x: x.contiguous().detach(),
        lambda x: x * 1,
        lambda x: x + 0.0,
        lambda x: torch.cat([x, EMPTY], -1),
    ],
)
def test_nothing_is_left(nothing: Callable[[Tensor], Tensor]) -> None:
    assert left(nothing) == []


@pytest.mark.parametrize(
    ("something", "operation"),
    [
        (lambda x: x[:, 1:], aten.slice),
        (lambda x: x[:, ::2], aten.slice),
        (lambda x: x.to(torch.float64), aten.to),
        (lambda x: x * 2, aten.mul),
        (lambda x: x + 1.0, aten.add),
        (lambda x: (x > 0) * 1, aten.mul),  # truth values become numbers
        (lambda x: torch.add(x, 0, alpha=2), aten.add),
        (lambda x: torch.cat([x, x], -1), aten.cat),
    ],
)
def test_what_changes_a_value_stays(
    something: Callable[[Tensor], Tensor], operation: object
) -> None:
    assert any(is_op(n, operation) for n in left(something))


def test_dropout_at_work_stays() -> None:
    gm = torch.export.export(
        Holder(lambda x: torch.dropout(x, 0.5, True)), (X,), strict=False
    ).module()
    assert isinstance(gm, fx.GraphModule)
    DropNoops()(gm)
    assert [n for n in gm.graph.nodes if is_op(n, aten.dropout)]


def test_reshape_takes_what_view_cannot() -> None:
    """A core's result may have other strides than the model's own."""
    gm = torch.export.export(Holder(lambda x: x.relu().view(2, 40)), (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    assert ViewToReshape()(gm).rewrites == 1
    (relu,) = (n for n in gm.graph.nodes if is_op(n, aten.relu))
    with gm.graph.inserting_after(relu):
        turned = gm.graph.call_function(aten.transpose.int, (relu, 1, 2))
    relu.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)
    gm.recompile()
    assert torch.equal(gm(X), X.relu().transpose(1, 2).reshape(2, 40) * 3)
