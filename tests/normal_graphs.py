"""Small functions as normalised graphs, for the tests of passes/normalize and of the evaluator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import is_op

WEIGHT = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))


class Holder(nn.Module):
    def __init__(self, function: Callable[..., Tensor], gain: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.gain = nn.Parameter(torch.rand(gain) + 0.5)
        self.bias = nn.Parameter(torch.rand(12))
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def graph(
    function: Callable[..., Tensor], *args: Tensor, gain: int = 8
) -> tuple[fx.GraphModule, Tensor]:
    """A normalised graph, after checking that it still computes the same."""
    module = Holder(function, gain).eval()
    gm = torch.export.export(module, args, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    expected = module(*args)
    normalize(gm)
    got = gm(*args)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
    return gm, got


def refusals(function: Callable[..., Tensor], *args: Tensor) -> str:
    """Why the spelled-out attention of a function was left alone."""
    gm = torch.export.export(Holder(function).eval(), args, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    ((_, reason),) = {r.name: r.refused for r in normalize(gm)}["fuse-eager"]
    return reason


def calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if is_op(n, target)]


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
