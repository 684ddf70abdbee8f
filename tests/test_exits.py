"""The way out of a core: which columns of which weight, or where the block ends without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_graphs import X, calls, core, rows, small
from torch import Tensor, fx

from reattend.passes.find.exits import FoundExit, read_exit
from reattend.passes.normalize.forms import aten
from reattend.spec import Joined

H, D = 2, 4
WEIGHTS = {
    "o": rows(6),
    "turned": rows(6).T.contiguous(),
    "bias": torch.rand(6),
    "wide": rows(6, 20),
}


def attended(x: Tensor) -> Tensor:
    """[B, H, N, d]: a core of the input itself."""
    q = x.unflatten(-1, (H, D)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


def joined(x: Tensor) -> Tensor:
    return attended(x).transpose(1, 2).flatten(2)


def read(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, FoundExit, dict[fx.Node, Any]]:
    gm, given = small(function, X, **WEIGHTS)
    (x,) = given
    return gm, read_exit(gm, core(gm), x, given, ""), given


def by_dimension(m: Any, x: Tensor) -> Tensor:
    """Heads vary fastest: dimension i of head h is column 2 i + h."""
    return F.linear(attended(x).permute(0, 2, 3, 1).flatten(2), m.o)


#: the projection's spelling -> weight, bias, stored transposed, columns
PROJECTED: list[tuple[Callable[..., Tensor], str, str | None, bool, list[int]]] = [
    (lambda m, x: F.linear(joined(x), m.o, m.bias), "o", "bias", False, list(range(8))),
    (lambda m, x: joined(x) @ m.turned, "turned", None, True, list(range(8))),
    (by_dimension, "o", None, False, [0, 2, 4, 6, 1, 3, 5, 7]),
]


@pytest.mark.parametrize(("function", "weight", "bias", "transposed", "columns"), PROJECTED)
def test_the_projection_and_its_columns(
    function: Callable[..., Tensor],
    weight: str,
    bias: str | None,
    transposed: bool,
    columns: list[int],
) -> None:
    gm, found, _ = read(function)
    assert found.node is calls(gm, aten.linear)[-1]
    assert found.out is not None and found.join is None
    assert (found.out.weight, found.out.bias, found.out.transposed) == (weight, bias, transposed)
    assert (found.out.features, list(found.out.columns)) == (6, columns)


def test_own_steps_before_the_projection_are_its_join() -> None:
    _, found, _ = read(lambda m, x: F.linear(joined(x).clamp(-0.5, 0.5), m.o))
    assert isinstance(found.join, Joined) and found.out is not None


def twice(m: Any, x: Tensor) -> Tensor:
    y = joined(x)
    return F.linear(y, m.o) + F.linear(y.flip(1), m.o)


ENDED: list[Callable[..., Tensor]] = [
    lambda _m, x: joined(x) + x,  # none at all
    lambda m, x: F.linear(joined(x), m.o * 2),  # its weight is computed
    twice,
    lambda m, x: F.linear(joined(x).reshape(2, 2, 20), m.wide),  # tokens side by side
    lambda m, x: F.linear(joined(x).reshape(10, 1, 8), m.o),  # tokens as rows of the batch
]


@pytest.mark.parametrize("function", ENDED)
def test_without_one_projection_the_block_ends_with_its_joined_heads(
    function: Callable[..., Tensor],
) -> None:
    gm, found, given = read(function)
    assert found.out is None
    assert found.node.meta["val"].shape == (2, 5, H * D)
    assert len(core(gm).users) == 1  # whoever read the core reads it behind the joined heads
    gm.recompile()
    with torch.no_grad():
        (x,) = given.values()
        module = small(function, X, **WEIGHTS)[0]
        assert torch.allclose(gm(x), module(x), atol=1e-6)
