"""The evaluator: any part of a graph for any values."""

from __future__ import annotations

import pytest
import torch
from normal_graphs import Holder, X, calls, graph
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator
from reattend.passes.normalize.forms import aten


def test_evaluator_runs_only_what_is_needed() -> None:
    gm, _ = graph(lambda m, x: (x @ m.weight.t()).relu() + m.bias, X)
    relu = calls(gm, aten.relu)[0]
    linear = calls(gm, aten.linear)[0]
    value = torch.full((2, 5, 12), -1.0)
    assert bool((Evaluator(gm).run([relu], {linear: value})[0] == 0).all())
    with pytest.raises(KeyError, match="needed here"):
        Evaluator(gm).run([relu], {})


def test_promotion_reaches_weights_and_casts() -> None:
    gm, _ = graph(lambda m, x: (x @ m.weight.t()).to(torch.float32).softmax(-1), X)
    last = [n for n in gm.graph.nodes if n.op == "call_function"][-1]
    given = {next(n for n in gm.graph.nodes if n.op == "placeholder"): X}
    assert Evaluator(gm, promote=torch.float64).run([last], given)[0].dtype == torch.float64


def test_evaluator_runs_writes_that_no_node_names() -> None:
    def rows(_m: Holder, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        first = y[:, 0]
        first.copy_(x[:, 1])
        y[:, 2:].mul_(0.0)
        return y + 1.0

    gm = torch.export.export(Holder(rows).eval(), (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    (add,), (x,) = calls(gm, aten.add), [n for n in gm.graph.nodes if n.op == "placeholder"]
    (zeros,) = calls(gm, aten.zeros_like)
    given = {x: X.clone(), zeros: torch.full_like(X, 2.0)}
    before, after = Evaluator(gm).run([zeros, add], given)
    assert bool((after[:, 0] == X[:, 1] + 1).all()) and bool((after[:, 1] == 3.0).all())
    assert bool((after[:, 2:] == 1.0).all())
    assert bool((before == 2.0).all()) and bool((given[zeros] == 2.0).all())
