"""Parts of a graph that was traced through vmap run alone, and nothing stays open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from reattend.passes.base import drop_dead
from reattend.passes.evaluate import Evaluator


class Pairs(nn.Module):
    """seen[i, j] by two nested vmaps, as transformers makes its masks; and something beside."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        i = torch.arange(x.shape[0])
        rows = torch.vmap(lambda a: torch.vmap(lambda b: (b <= a) & (a - b < 3))(i))(i)
        return rows, x + 1


def captured() -> tuple[Any, list[fx.Node], fx.Node]:
    shapes = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(Pairs(), (torch.randn(7),), dynamic_shapes=shapes, strict=False)
    gm: Any = program.module()
    (output,) = [n for n in gm.graph.nodes if n.op == "output"]
    (place,) = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return gm, list(torch.utils._pytree.tree_leaves(output.args)), place


@pytest.mark.parametrize("cleaned", [False, True])
def test_a_vmapped_value_runs_alone_at_another_length(cleaned: bool) -> None:
    gm, (rows, beside), place = captured()
    if cleaned:
        drop_dead(gm.graph)
    x = torch.randn(11)
    got = Evaluator(gm).run([rows, beside], {place: x})
    expected = Pairs()(x)
    assert all(bool((a == b).all()) for a, b in zip(got, expected, strict=True))


def test_an_error_inside_leaves_no_level_open() -> None:
    gm, (rows, _), place = captured()
    inside = next(n for n in gm.graph.nodes if n.name.startswith("le"))

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        Evaluator(gm, replace={inside: fails}).run([rows], {place: torch.randn(9)})
    assert torch._C._functorch.maybe_current_level() is None
