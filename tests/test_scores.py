"""The parts of spelled-out scores, or the node that is none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_graphs import calls, small
from torch import Tensor, fx, nn

from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.score_values import refolds
from reattend.passes.normalize.scores import Scores, read_scores

Q, K = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)


class Spelled(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.warm, self.sink = nn.Parameter(torch.rand(3, 1, 1)), nn.Parameter(torch.rand(3))
        self.function = function

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.function(self, q, k).softmax(-1)


def read(function: Callable[..., Tensor]) -> Scores | fx.Node:
    """Of a graph as it was captured, no pass run before."""
    gm = torch.export.export(Spelled(function).eval(), (Q, K), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    (softmax,) = calls(gm, aten.softmax)
    return read_scores(gm, softmax)


def products(_m: Any, q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT


def test_numbers_multiply_up_to_the_cap() -> None:
    found = read(lambda m, q, k: 2.0 * (torch.tanh(products(m, q, k) * 0.25 / 7.0) * 7.0))
    assert not isinstance(found, Scores)  # a factor behind the cap
    found = read(lambda m, q, k: torch.tanh(products(m, q, k) * 0.25 / 7.0) * 7.0)
    assert isinstance(found, Scores)
    assert (found.scale, found.softcap, found.heads) == (0.25, 7.0, 3)
    assert (found.q.op, found.terms, found.factors, found.sinks) == ("placeholder", (), (), None)


def test_terms_carry_the_factor_that_follows_them() -> None:
    found = read(
        lambda m, q, k: ((products(m, q, k) + LATER.float()) / 4.0).masked_fill(LATER, -1e9)
    )
    assert isinstance(found, Scores)
    added, hidden = found.terms
    assert (added.factor, added.hidden) == (0.25, False)
    assert (hidden.hidden, hidden.inverted, found.scale) == (True, False, 0.25)


def test_weights_per_head_and_sinks() -> None:
    def spelled(m: Any, q: Tensor, k: Tensor) -> Tensor:
        column = m.sink.reshape(1, -1, 1, 1).expand(2, -1, 5, -1)
        return torch.cat([products(m, q, k) / m.warm, column], -1)

    found = read(spelled)
    assert isinstance(found, Scores)
    ((factor, divides),) = found.factors
    assert (str(factor.target), divides) == ("warm", True)
    assert found.sinks is not None and str(found.sinks.target) == "sink"


def test_a_column_that_every_query_computes_is_a_term_beside_a_logit_of_zero() -> None:
    found = read(lambda m, q, k: torch.cat([products(m, q, k), q[..., :1]], -1))
    assert isinstance(found, Scores) and found.column and found.sinks is None
    ((node, factor),) = [(t.node, t.factor) for t in found.terms]
    assert is_op(node, aten.slice) and factor == -1.0


REFUSED: list[tuple[Callable[..., Tensor], object]] = [
    (lambda m, q, k: products(m, q, k).relu(), aten.relu),
    (lambda m, q, k: products(m, q, k).masked_fill(LATER, -1.0), aten.masked_fill),
    (lambda m, q, k: torch.tanh(products(m, q, k) / 7.0) * 5.0, aten.mul),
    (lambda m, q, k: products(m, q, k) * q.mean(-1, keepdim=True), aten.mul),
    (lambda m, q, k: products(m, q, k).clamp(min=-1.0), aten.clamp),
    (lambda m, q, k: torch.where(LATER, products(m, q, k), 0.0), aten.where),
    (lambda m, q, k: (products(m, q, k) + LATER) * m.warm, aten.add),
    (lambda m, q, k: torch.cat([products(m, q, k), q[..., :2]], -1), aten.cat),
]


@pytest.mark.parametrize(("function", "operation"), REFUSED)
def test_the_node_that_is_not_understood(
    function: Callable[..., Tensor], operation: object
) -> None:
    found = read(function)
    assert isinstance(found, fx.Node) and is_op(found, operation)


def test_a_reshape_that_only_folds_heads() -> None:
    gm, _ = small(lambda _m, q: q.reshape(6, 5, 4).cos().view(2, 3, 5, 4).reshape(2, 15, 4), Q)
    assert [refolds(n) for n in calls(gm, aten.reshape)] == [True, True, False]
    gm, _ = small(lambda _m, q: q.reshape(1, 2, 3, 5, 4), Q)
    assert not refolds(calls(gm, aten.reshape)[0])  # a fifth axis
