"""Where a stream begins: at one linear layer, or at the end of the model's own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F  # noqa: N812
from small_graphs import X, calls, result, rows, small
from torch import Tensor

from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.streams import find_projection, read_carried, read_stream
from reattend.passes.normalize.forms import aten
from reattend.spec import Opaque, Proj

WEIGHTS = {"w": rows(8), "v": rows(8) * 2}


def heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (2, 4)).transpose(1, 2)


def plain(m: Any, x: Tensor) -> Tensor:
    return heads(F.linear(x, m.w))


def summed(m: Any, x: Tensor) -> Tensor:
    return heads(F.linear(x, m.w) + F.linear(x, m.v))


def clipped(m: Any, x: Tensor) -> Tensor:
    return heads(F.linear(x.tanh(), m.w).clamp(-0.5, 0.5))


def unprojected(_m: Any, x: Tensor) -> Tensor:
    return heads(x)


def test_a_linear_layer_begins_it() -> None:
    gm, given = small(plain, X, **WEIGHTS)
    found = read_stream(gm, result(gm), given)
    assert found.projection is find_projection(result(gm)) is calls(gm, aten.linear)[0]
    assert isinstance(found.steps[0], Proj) and not found.carried
    assert found.hidden in given


@pytest.mark.parametrize(
    ("function", "hidden"), [(summed, "placeholder"), (clipped, "call_function")]
)
def test_own_steps_begin_it_where_no_layer_does(
    function: Callable[..., Tensor], hidden: str
) -> None:
    """They begin at the value that every projection behind them reads."""
    gm, given = small(function, X, **WEIGHTS)
    found = read_stream(gm, result(gm), given)
    assert isinstance(found.steps[0], Opaque)
    assert found.hidden.op == hidden
    carried = read_carried(gm, result(gm), given)
    assert carried is not None and carried.carried


@pytest.mark.parametrize(("function", "count"), [(summed, "2 projections"), (unprojected, "no pr")])
def test_there_is_one_projection_or_a_reason(function: Callable[..., Tensor], count: str) -> None:
    gm, _ = small(function, X, **WEIGHTS)
    with pytest.raises(NotUnderstood, match=count):
        find_projection(result(gm))


def test_without_a_projection_there_is_no_stream() -> None:
    gm, given = small(unprojected, X, **WEIGHTS)
    assert read_carried(gm, result(gm), given) is None
    with pytest.raises(NotUnderstood, match="no projection behind"):
        read_stream(gm, result(gm), given)
