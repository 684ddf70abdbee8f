"""Copies into parts of a tensor become new tensors, so that any part of a graph can be run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.passes.evaluate import Evaluator
from reattend.passes.normalize.copies import ScatterCopies
from reattend.passes.normalize.forms import aten, is_op

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


def captured(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    gm: Any = torch.export.export(Run(function), (X,), strict=False).module()
    return gm  # type: ignore[no-any-return]


def by_parts(gm: fx.GraphModule) -> Tensor:
    """The output, computed from what it is visibly made of."""
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    (x,) = [n for n in gm.graph.nodes if n.op == "placeholder"]
    made: Tensor = Evaluator(gm).run([output.all_input_nodes[0]], {x: X})[0]
    return made


@pytest.mark.parametrize("function", [halves, one_row])
def test_parts_can_be_run(function: Callable[[Tensor], Tensor]) -> None:
    gm = captured(function)
    assert not torch.equal(by_parts(gm), function(X))
    result = ScatterCopies()(gm)
    assert result.modified
    assert not result.refused
    assert torch.equal(gm(X), function(X))
    assert torch.equal(by_parts(gm), function(X))


def test_what_is_read_under_another_name_stays() -> None:
    gm = captured(through_a_view)
    result = ScatterCopies()(gm)
    assert "read after it was changed" in result.refused[0][1] or "view" in result.refused[0][1]
    assert any(is_op(n, aten.copy_) for n in gm.graph.nodes)
    assert torch.equal(gm(X), through_a_view(X))
