"""Parts of a block cut out as programs: sizes come from their inputs, numbers are written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_graphs import X, calls, result, rows, small
from torch import Tensor

from reattend.passes.evaluate import attribute
from reattend.passes.find.programs import CutOut, cut_out, then
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten
from reattend.program import ProgramModule

OTHER = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))


def counted(m: Any, x: Tensor) -> Tensor:
    """Knows its number of tokens, a lifted number, and a weight."""
    place = torch.arange(x.shape[1])[:, None] * torch.tensor(0.5)
    return F.linear(x, m.w) + place


def windows(_m: Any, x: Tensor) -> Tensor:
    """[B, N, 8] -> [2 B, N, 4]: a size that is a number of times the input's."""
    return x.unflatten(-1, (2, 4)).transpose(1, 2).reshape(2 * x.shape[0], x.shape[1], 4).cos()


def cut(function: Callable[..., Tensor], *inputs: Tensor) -> CutOut:
    gm, given = small(function, *inputs, symbolic=True, w=rows(8))
    return cut_out(gm, result(gm), {next(iter(given)): "x"}, "it")


def test_it_runs_at_other_sizes() -> None:
    part = cut(counted, X)
    assert part.sources == (("w0", "w"),)
    module = ProgramModule(part.program)
    module.load_state_dict({"w0": rows(8)})
    for x in (X, torch.randn(3, 11, 8)):
        expected = F.linear(x, rows(8)) + torch.arange(x.shape[1])[:, None] * 0.5
        torch.testing.assert_close(module(x), expected)


def test_a_size_that_divides_one_of_the_inputs() -> None:
    """From [2 B, N, 4] back to [B, N, 8]: the batch is half of what is given."""
    gm, _ = small(lambda m, x: windows(m, x).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2).sin()
                  .reshape(x.shape[0], x.shape[1], 8), X, symbolic=True)  # fmt: skip
    (middle,) = calls(gm, aten.cos)
    module = ProgramModule(cut_out(gm, result(gm), {middle: "y"}, "it").program)
    for batch, length in ((2, 5), (3, 7)):
        y = torch.randn(2 * batch, length, 4)
        expected = y.unflatten(0, (batch, 2)).transpose(1, 2).flatten(2).sin()
        assert torch.equal(module(y), expected)


def test_one_more_operation() -> None:
    module = ProgramModule(
        then(cut(lambda _m, x: x.cos(), X).program, "aten.flatten.using_ints", 1)
    )
    assert torch.equal(module(OTHER), OTHER.cos().flatten(1))


def attending(_m: Any, x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


REFUSED: list[tuple[str, Callable[..., Tensor]]] = [
    ("it: it also depends on the model's input", lambda _m, x, y: x.mean(1) + y.mean(1)),
    ("depends on a size", lambda _m, x, y: x + torch.arange(y.shape[1]).sum()),
    ("it holds another attention core", lambda m, x, _y: attending(m, x)),
]


@pytest.mark.parametrize(("reason", "function"), REFUSED)
def test_what_is_no_function_of_its_inputs_is_refused(
    reason: str, function: Callable[..., Tensor]
) -> None:
    with pytest.raises(NotUnderstood, match=reason):
        cut(function, X, OTHER)


def test_weights_stay_weights() -> None:
    """A number of the code is written out; a parameter of one element is none."""
    gm, given = small(lambda m, x: x * m.one * torch.tensor(3.0), X, one=torch.tensor(2.0))
    part = cut_out(gm, result(gm), {next(iter(given)): "x"}, "it")
    assert [attribute(gm, name).item() for _, name in part.sources] == [2.0]
