"""Rotations are fitted to what a stream does, whatever its spelling; what is none says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.rotary import Rotation, fit_rotation
from reattend.spec import Proj

B, N, H, W = 3, 6, 2, 8
FREQ = torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64)
AT = torch.arange(N, dtype=torch.float64)[:, None] * FREQ
Turn = Callable[[Tensor], Tensor]


def half(x: Tensor, at: Tensor = AT, scale: float = 1.0) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = at.cos() * scale, at.sin() * scale
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def interleaved(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(turned * torch.polar(torch.ones_like(AT), AT)).flatten(-2)


def partly(x: Tensor) -> Tensor:
    return torch.cat([half(x[..., :4], AT[:, :2]), 0.5 * x[..., 4:]], -1)


def fitted(turn: Turn, factor: Tensor | None = None) -> Rotation | None:
    """What is fitted to `turn` of [B, H, N, W], behind a projection of H W rows in order."""

    def push(y: Tensor) -> Tensor:
        return turn(y.unflatten(-1, (H, W)).transpose(1, 2))

    proj = Proj("w", None, H, W, tuple(range(H * W)))
    scale = torch.ones(H, W, dtype=torch.float64) if factor is None else factor
    return fit_rotation(push, torch.zeros(B, N, H * W, dtype=torch.float64), proj, scale)


@pytest.mark.parametrize(
    ("turn", "pairing", "scaling"),
    [
        (half, "half", 1.0),
        (interleaved, "interleaved", 1.0),
        (lambda x: half(x, scale=1.3), "half", 1.3),
        (lambda x: half(x.roll(1, -1)).roll(-1, -1), "other", 1.0),
        (lambda x: half(x, -AT), "half", 1.0),
    ],
)
def test_every_spelling_is_one_record(turn: Turn, pairing: str, scaling: float) -> None:
    found = fitted(turn)
    assert found is not None and found.spec is not None
    assert found.spec.scaling == pytest.approx(scaling, abs=1e-12)
    assert sorted(found.spec.inv_freq) == pytest.approx(sorted(FREQ.tolist()), abs=1e-12)
    if pairing != "half" or turn is half:
        assert found.spec.pairing == pairing


def test_a_part_may_pass_with_a_factor() -> None:
    factor = torch.ones(H, W, dtype=torch.float64)
    factor[:, 4:] = 0.5
    with pytest.raises(NotUnderstood, match="rotary scaling differs|not a rotation"):
        fitted(lambda x: torch.cat([half(x[..., :4] * AT.exp()[:, :1], AT[:, :2]), x[..., 4:]], -1))
    found = fitted(partly, factor)
    assert found is not None and found.spec is not None
    assert found.constant == 0.5 and found.spec.scaling == pytest.approx(2.0)
    assert found.spec.pairs == ((0, 2), (1, 3))


def test_what_no_position_changes_has_none() -> None:
    assert fitted(lambda x: 0.5 * x) is None


def by_head(x: Tensor) -> Tensor:
    return torch.stack([half(x[:, 0]), half(x[:, 1], 2 * AT)], 1)


def mixed(x: Tensor) -> Tensor:
    return half(x) + half(x.roll(1, -1), AT.flip(-1))


def sheared(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a + AT * b, b], -1)


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (by_head, "heads rotate differently"),
        (mixed, "mixes with"),
        (lambda x: x * (1 + AT[:, :1]), "does not rotate"),
        (sheared, "not a rotation|mixes"),
        (lambda x: half(x) * (1 + AT[:, :1]), "scaling differs between positions"),
    ],
)
def test_what_is_no_rotation_says_why(turn: Turn, why: str) -> None:
    with pytest.raises(NotUnderstood, match=why):
        fitted(turn)
