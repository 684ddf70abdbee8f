"""A function of a few operations, captured and normalised: for tests of one step of the finder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def rows(count: int, width: int = 8) -> Tensor:
    """A weight of `count` rows."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


class Holder(nn.Module):
    """The function as a model; its weights are attributes."""

    def __init__(self, function: Callable[..., Tensor], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def small(
    function: Callable[..., Tensor], *args: Tensor, symbolic: bool = False, **weights: Tensor
) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """The normalised graph of `function(module, *args)`, and the values of its placeholders."""
    module = Holder(function, weights).eval()
    axes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    shapes = (tuple(axes for _ in args),) if symbolic else None
    gm = torch.export.export(module, args, dynamic_shapes=shapes, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    normalize(gm)
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return gm, dict(zip(places, args, strict=True))


def result(gm: fx.GraphModule) -> fx.Node:
    """What a graph returns."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return output.all_input_nodes[0]


def calls(gm: fx.GraphModule, *targets: object) -> list[fx.Node]:
    """The nodes that call one of some operations, in order."""
    return [n for n in gm.graph.nodes if is_op(n, *targets)]


def core(gm: fx.GraphModule) -> fx.Node:
    """The one attention core of a graph."""
    (node,) = calls(gm, attention)
    return node
