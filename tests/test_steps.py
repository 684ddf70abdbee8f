"""The steps of a stream, read by running what stands between a projection and a core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_graphs import X, calls, result, rows, small
from torch import Tensor

from reattend.passes.find.opaque import Start
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.steps import FoundStream, read_from
from reattend.passes.find.stored import projection_rows
from reattend.passes.normalize.forms import aten
from reattend.spec import Norm, Rotary, Scale

H, D = 2, 4
WEIGHTS = {"w": rows(24), "gain": torch.rand(D) + 0.5, "wide": torch.rand(H * D) + 0.5}
ANGLE = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1])


def heads(y: Tensor) -> Tensor:
    """[B, N, H d] -> [B, H, N, d]."""
    return y.unflatten(-1, (H, D)).transpose(1, 2)


def turned(y: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    cos, sin = ANGLE.cos(), ANGLE.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def first(m: Any, x: Tensor) -> Tensor:
    """The first 8 rows of the weight, by head."""
    return heads(F.linear(x, m.w)[..., : H * D])


def rms(y: Tensor, gain: Tensor) -> Tensor:
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * gain


def read(function: Callable[..., Tensor], **weights: Tensor) -> FoundStream:
    """The stream that a function of the weights is, from its one projection on."""
    gm, given = small(function, X, **(WEIGHTS | weights))
    (projection,) = calls(gm, aten.linear)
    start = Start(projection, (projection,))
    return read_from(gm, result(gm), given, start, projection_rows(gm, projection))


def fused(m: Any, x: Tensor) -> Tensor:
    """Keys of a projection that holds queries, keys and values head by head."""
    return F.linear(x, m.w).unflatten(-1, (H, 3, D))[:, :, :, 1].transpose(1, 2)


def test_an_index_pushed_through_shows_the_rows() -> None:
    (proj,) = read(fused).steps
    assert (proj.heads, proj.width) == (H, D)
    assert proj.rows == (4, 5, 6, 7, 16, 17, 18, 19)


NORM = Norm("rms", "head", 1e-6, "gain")
#: what follows the rows -> the steps behind the projection
STEPS: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = [
    (lambda m, x: 0.5 * first(m, x) / 2, (Scale(0.25),)),
    (lambda m, x: rms(first(m, x), m.gain), (NORM,)),
    (lambda m, x: rms(first(m, x), 1.0 + m.gain), (Norm("rms", "head", 1e-6, "gain", 1.0),)),
    (
        lambda m, x: heads(F.layer_norm(F.linear(x, m.w)[..., :8], (8,), m.wide)),
        (Norm("layer", "full", 1e-5, "wide"),),
    ),
    (lambda m, x: turned(first(m, x)), (Rotary,)),
    (lambda m, x: turned(rms(first(m, x), m.gain)), (NORM, Rotary)),
    (lambda m, x: rms(turned(first(m, x)), m.gain), (Rotary, NORM)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), STEPS)
def test_steps_in_their_order(function: Callable[..., Tensor], expected: tuple[Any, ...]) -> None:
    steps = read(function).steps[1:]
    assert len(steps) == len(expected)
    for step, wanted in zip(steps, expected, strict=True):
        if wanted is Rotary:
            assert isinstance(step, Rotary) and step.pairing == "half"
            assert step.inv_freq == pytest.approx((1.0, 0.1))
        else:
            assert step == wanted


def doubled(m: Any, x: Tensor) -> Tensor:
    y = first(m, x)
    return y + y.flip(-1)


def windows(m: Any, x: Tensor) -> Tensor:
    return first(m, x)[:, :, 1:].unflatten(2, (2, 2)).transpose(1, 2).flatten(0, 1)


def narrow(m: Any, x: Tensor) -> Tensor:
    return rms(first(m, x).unflatten(-1, (2, 2)), m.gain[:2]).flatten(-2)


REFUSED: list[tuple[str, Callable[..., Tensor]]] = [
    ("scaled per head or per dimension", lambda m, x: first(m, x) * torch.arange(1.0, 5.0)),
    ("not a row map", lambda m, x: first(m, x).relu()),
    ("not a row map", doubled),
    ("reads no single projection row", lambda m, x: F.pad(first(m, x), (0, 1))),
    ("come from no token", lambda m, x: F.pad(first(m, x), (0, 0, 1, 0))),
    ("tokens are regrouped", lambda m, x: first(m, x)[:, :, ::2]),
    ("has shape .*, not batch", windows),
    ("not batch, head, token, width", lambda m, x: F.linear(x, m.w)[..., :8]),
    ("more than one norm", lambda m, x: rms(rms(first(m, x), m.gain), m.gain)),
    ("a constant factor beside a norm", lambda m, x: 0.5 * rms(first(m, x), m.gain)),
    ("a norm over 2 dimensions", narrow),
    ("gain is computed", lambda m, x: rms(first(m, x), m.gain.exp())),
    ("does not rotate", lambda m, x: first(m, x) * torch.arange(1.0, 6.0)[:, None]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "function"), REFUSED)
def test_what_is_no_step_is_refused(reason: str, function: Callable[..., Tensor]) -> None:
    with pytest.raises(NotUnderstood, match=reason):
        read(function)
