"""Which module a node comes from, and which tensors reach that module from outside."""

from __future__ import annotations

import torch
from small_graphs import calls
from torch import Tensor, fx, nn

from reattend.passes.find.owners import from_outside, owner_of
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        inside = self.k(x) * place
        return self.q(x).tanh() + inside


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.rand(3, 4))

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return self.head(self.block(x.relu(), self.table.cos() * factor.sin()))


def captured() -> fx.GraphModule:
    inputs = (torch.rand(2, 3, 4), torch.rand(3, 4))
    gm = torch.export.export(Model().eval(), inputs, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    normalize(gm)
    return gm


def test_the_smallest_module_that_holds_all() -> None:
    gm = captured()
    k, q, head = calls(gm, aten.linear)
    assert owner_of([k]) == "block.k"
    assert owner_of([k, q, calls(gm, aten.tanh)[0]]) == "block"
    assert owner_of([k, head]) == ""


def test_what_reaches_a_module_from_outside() -> None:
    gm = captured()
    (relu,), (sin,), (cos,) = (calls(gm, op) for op in (aten.relu, aten.sin, aten.cos))
    place, product = calls(gm, aten.mul)
    assert from_outside(product, "block") == [relu, place]
    assert from_outside(product, "block", known=(relu,)) == [place]
    assert from_outside(product, "block", known=(product,)) == []
    assert from_outside(calls(gm, aten.tanh)[0], "block") == [relu]
    assert from_outside(cos, "block") == []  # of weights alone: its own, wherever it is computed
    assert [n.op for n in from_outside(sin, "")] == ["placeholder"]
