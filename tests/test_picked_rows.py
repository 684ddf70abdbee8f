"""Weights that are rows of a larger stored tensor, as torch packs queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_graphs import X, calls, rows, small
from torch import Tensor, fx

from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.stored import picked_rows, projection_rows, stored_steps, weight_of
from reattend.passes.normalize.forms import aten
from reattend.spec import Proj, Scale

PACKED, BIAS = rows(24), torch.rand(24)


def projection(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, fx.Node]:
    gm, _ = small(function, X, w=PACKED, b=BIAS, turned=PACKED.T.contiguous())
    (node,) = calls(gm, aten.linear)
    return gm, node


PICKS: list[Callable[[Any], Tensor]] = [
    lambda m: m.w[8:16],
    lambda m: m.w.chunk(3)[1],
    lambda m: m.w.split([8, 8, 8])[1],
    lambda m: m.w.narrow(0, 8, 8),
]


@pytest.mark.parametrize("pick", PICKS)
def test_the_rows_of_what_is_stored(pick: Callable[[Any], Tensor]) -> None:
    gm, node = projection(lambda m, x: F.linear(x, pick(m), m.b[8:16]))
    assert picked_rows(gm, node.args[1]) == ("w", tuple(range(8, 16)))
    made = projection_rows(gm, node)(2, tuple(range(8, 16)))
    assert made == Proj("w", "b", 2, 4, tuple(range(8, 16)))
    # a stream that reads rows 3 and 1 of the layer reads rows 11 and 9 of what is stored
    steps = (Proj("w", "b", 1, 2, (3, 1)), Scale(2.0))
    assert stored_steps(gm, node, steps) == (Proj("w", "b", 1, 2, (11, 9)), Scale(2.0))


def test_a_weight_stored_as_it_is() -> None:
    gm, node = projection(lambda m, x: F.linear(x, m.w, m.b))
    assert picked_rows(gm, node.args[1]) is None
    assert weight_of(node.args[1]) == ("w", False)
    steps = (Proj("w", "b", 1, 2, (3, 1)),)
    assert stored_steps(gm, node, steps) is steps
    gm, node = projection(lambda m, x: x @ m.turned)
    assert weight_of(node.args[1]) == ("turned", True)
    assert projection_rows(gm, node)(1, (3, 1)).transposed


REFUSED: list[tuple[str, Callable[..., Tensor]]] = [
    ("is computed", lambda m, x: F.linear(x, 2 * m.w)),
    ("is computed", lambda m, x: F.linear(x, torch.where(m.w > 0, m.w, m.w))),
    ("a part of the columns of w", lambda m, x: F.linear(x[..., :4], m.w[:, :4])),
    ("other rows", lambda m, x: F.linear(x, m.w[:8], m.b[8:16])),
]


@pytest.mark.parametrize(("reason", "function"), REFUSED)
def test_what_is_not_stored_is_refused(reason: str, function: Callable[..., Tensor]) -> None:
    gm, node = projection(function)
    with pytest.raises(NotUnderstood, match=reason):
        projection_rows(gm, node)(2, tuple(range(8)))


def test_weight_of_refuses_what_is_computed() -> None:
    _, node = projection(lambda m, x: F.linear(x, 2 * m.w))
    with pytest.raises(NotUnderstood, match="computed"):
        weight_of(node.args[1])
