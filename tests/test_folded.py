"""A linear layer on folded tokens is read on the tokens themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattend.passes.normalize.folded import UnfoldLinear
from reattend.passes.normalize.forms import aten, is_op
from reattend.passes.normalize.noops import ViewToReshape

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


class Folded(nn.Module):
    """`other`: the result is given other axes than the input had; `read`: someone reads it flat."""

    def __init__(self, other: bool = False, read: bool = False) -> None:
        super().__init__()
        self.linear, self.other, self.read = nn.Linear(8, 6), other, read

    def forward(self, x: Tensor) -> Tensor:
        flat = self.linear(x.reshape(-1, 8))
        y = flat.view(*((5, 2) if self.other else (2, 5)), 6)
        return y + flat.sum() if self.read else y


def unfolded(module: Folded) -> tuple[Any, Any]:
    gm: Any = torch.export.export(module, (X,), strict=False).module()
    ViewToReshape()(gm)
    result = UnfoldLinear()(gm)
    assert torch.allclose(gm(X), module(X), rtol=1e-6, atol=1e-6)
    return gm, result


def test_the_fold_disappears() -> None:
    gm, result = unfolded(Folded())
    assert result.rewrites == 1
    (linear,) = [n for n in gm.graph.nodes if is_op(n, aten.linear)]
    assert linear.args[0].op == "placeholder"
    assert not [n for n in gm.graph.nodes if is_op(n, aten.reshape)]


def test_other_axes_stay_a_reshape_before_the_layer() -> None:
    gm, result = unfolded(Folded(other=True))
    assert result.rewrites == 1
    (linear,) = [n for n in gm.graph.nodes if is_op(n, aten.linear)]
    assert tuple(linear.meta["val"].shape) == (5, 2, 6)


def test_a_result_that_is_read_flat_stays() -> None:
    assert not unfolded(Folded(read=True))[1].modified
