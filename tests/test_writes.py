"""Copies into parts of a tensor become new tensors, so that any part of a graph can be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.passes.aliases import writes
from reattend.passes.evaluate import ancestors
from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.writes import WritesToScatter

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


class Run(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def halves(x: Tensor) -> Tensor:
    table = torch.zeros_like(x)
    table[..., :3] = x[..., 3:].sin()
    table[:, 1:, 3:] = x[:, 1:, :3].cos()
    return table + x


def one_row(x: Tensor) -> Tensor:
    table = x * 2
    table[:, 0] = 1.0
    table[:, :, 2] += x[:, :, 3]
    return table


def through_a_view(x: Tensor) -> Tensor:
    table = torch.zeros_like(x)
    part = table[..., :3]
    table[..., :3] = x[..., 3:]
    return part + x[..., :3]


def every_view(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    turned, last = y.transpose(1, 2), y[:, -1]
    y[:, 0] = x[:, 1]
    turned[:, 2] = 7.0
    y[:, :, 3:].add_(x[:, :, 3:])
    return turned.sum(-1) + last


def under_a_copy(x: Tensor) -> Tensor:
    y = x.transpose(1, 2) * 2.0
    flat = y.reshape(2, -1)
    y[:, 0] = 1.0
    return flat * 1.0


def into_the_input(x: Tensor) -> Tensor:
    x[:, 0] = 1.0
    return x * 2


def captured(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    gm: Any = torch.export.export(Run(function), (X,), strict=False).module()
    return gm  # type: ignore[no-any-return]


def changed_in_place(gm: fx.GraphModule) -> list[fx.Node]:
    """Values behind the output that a node which the output does not visibly need writes to."""
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    behind = ancestors([output])
    return [n for n in gm.graph.nodes if writes(n) is not None and n not in behind]


@pytest.mark.parametrize("function", [halves, one_row, through_a_view, every_view])
def test_parts_can_be_run(function: Callable[[Tensor], Tensor]) -> None:
    gm = captured(function)
    assert changed_in_place(gm)
    result = WritesToScatter()(gm)
    assert result.modified
    assert not result.refused
    assert not [n for n in gm.graph.nodes if writes(n) is not None]
    assert torch.equal(gm(X), function(X))


def test_a_part_is_scattered_back() -> None:
    gm = captured(lambda x: (x * 2.0)[..., :4].mul_(3.0) + 1.0)
    WritesToScatter()(gm)
    assert [n for n in gm.graph.nodes if is_op(n, aten.slice_scatter)]


@pytest.mark.parametrize(
    ("function", "words"),
    [(into_the_input, "an input"), (under_a_copy, "may or may not be a view")],
)
def test_what_may_be_seen_elsewhere_is_left_alone(
    function: Callable[[Tensor], Tensor], words: str
) -> None:
    gm = captured(function)
    result = WritesToScatter()(gm)
    assert words in result.refused[0][1]
    assert not result.modified
    x = X.clone()
    assert torch.equal(gm(x), function(X.clone()))
