"""The way from one projection to a core, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_graphs import X, calls, result, rows, small
from torch import Tensor, fx

from reattend.passes.normalize.forms import aten
from reattend.passes.normalize.ways import Way, known, the_projection, way_to

WEIGHTS = {"w": rows(8), "v": 2 * rows(8), "gain": torch.rand(4)}


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (2, 4)).transpose(1, 2)


def way(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, Way | None]:
    gm, _ = small(function, X, symbolic=True, **WEIGHTS)
    return gm, way_to(gm, result(gm))


def test_it_runs_on_codes() -> None:
    gm, found = way(lambda m, x: heads(F.linear(x, m.w)) * m.gain + 0 * x.shape[0])
    assert found is not None
    assert [found.projection] == calls(gm, aten.linear)
    assert found.chain[-1] is result(gm) and found.projection not in found.chain
    assert found.shape == [2, 5, 8]
    pushed = found.push(torch.arange(8, dtype=torch.float64))
    expected = heads(torch.arange(8.0).expand(2, 5, 8)).double() * WEIGHTS["gain"].double()
    assert torch.equal(pushed, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: heads(F.linear(x, m.w) + F.linear(x, m.v)),  # two projections
        lambda _m, x: heads(x),  # none
        lambda m, x: heads(F.linear(x, m.w) + x),  # another tensor beside
    ],
)
def test_what_reads_more_than_one_projection_is_none(function: Callable[..., Any]) -> None:
    assert way(function)[1] is None


def test_the_nearest_projection_counts() -> None:
    gm, _ = small(lambda m, x: heads(F.linear(F.linear(x, m.w), m.v)), X, **WEIGHTS)
    assert the_projection(result(gm)) is calls(gm, aten.linear)[1]
    gm, _ = small(lambda m, x: heads(F.linear(x, m.w) + F.linear(x, m.v)), X, **WEIGHTS)
    assert the_projection(result(gm)) is None


def test_a_size_is_known_as_it_was_at_capture() -> None:
    _, given = small(lambda m, x: F.linear(x, m.w), X, symbolic=True, **WEIGHTS)
    (x,) = given
    assert not isinstance(x.meta["val"].shape[1], int)
    assert [known(size) for size in x.meta["val"].shape] == [2, 5, 8]
    assert known(7) == 7
