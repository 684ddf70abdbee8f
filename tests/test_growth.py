"""Queries that grow with position: at an example's length the factor is one, and yet it is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.spec import Growth, Opaque, Scale
from reattend.weights import dense_config

WIDTH, HEADS = 16, 2


class Attention(nn.Module):
    """Llama 4 counts its tokens; Ministral 3 is told (`place`). `form`: another function."""

    def __init__(self, period: int, form: str) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.period, self.form = period, form

    def factor(self, x: Tensor, place: Tensor | None) -> Tensor:
        if place is None:
            place = torch.arange(x.shape[1]) + 1
        if self.form == "root":
            return torch.sqrt(1 + torch.floor(place.float() / self.period))
        if self.form == "smooth":
            return 1.0 + 0.5 * torch.log((place.float() / self.period).clamp(min=1.0))
        return torch.log1p(torch.floor(place.float() / self.period)) * 0.5 + 1.0

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        factor = self.factor(x, place)
        q = q * factor.view(-1, x.shape[1], 1, 1).expand(x.shape[0], -1, 1, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, period: int, told: bool, form: str = "log") -> None:
        super().__init__()
        self.told = told
        self.attn = Attention(period, form)

    def forward(self, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])[None] if self.told else None
        return x + self.attn(x, place)


def made(period: int, told: bool, form: str = "log") -> Model:
    torch.manual_seed(2)
    return Model(period, told, form).eval()


def inputs(batch: int = 2, length: int = 7) -> dict[str, Any]:
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))}


@pytest.mark.daily
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("period", [4, 600])
def test_a_factor_is_read_far_beyond_the_example(period: int, told: bool) -> None:
    model = made(period, told)
    (site,) = find_attention(model, inputs()).sites
    scale = site.spec.q.first(Scale)
    assert isinstance(scale, Scale)
    assert scale.growth is not None
    assert scale.growth.beta == pytest.approx(0.5, abs=1e-6)
    assert (scale.growth.offset, scale.growth.period) == (0 if told else 1, period)
    assert (site.binding.position is not None) == told  # type: ignore[union-attr]
    converted = convert(model, plan="identity", inputs=inputs()).model
    for given in (inputs(), inputs(1, 1300)):
        with torch.no_grad():
            assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5


def test_a_factor_without_steps() -> None:
    model = made(600, told=False, form="smooth")
    (site,) = find_attention(model, inputs()).sites
    scale = site.spec.q.first(Scale)
    assert isinstance(scale, Scale) and scale.growth is not None
    assert (scale.growth.offset, scale.growth.period, scale.growth.smooth) == (1, 600, True)
    assert scale.growth.beta == pytest.approx(0.5, abs=1e-6)
    converted = convert(model, plan="identity", inputs=inputs()).model
    with torch.no_grad():
        given = inputs(1, 1300)
        assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5


def test_mla_keeps_the_factor() -> None:
    model = made(4, told=False)
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 2 * WIDTH, "allow_growth": True}]}
    converted = convert(model, plan=plan, inputs=inputs(), data=[inputs(2, 30)]).model
    with torch.no_grad():
        assert float((converted(**inputs()) - model(**inputs())).abs().max()) <= 1e-4


def test_positions_are_counted_from_the_cache() -> None:
    (site,) = find_attention(made(4, told=False), inputs()).sites
    mixer = DenseAttention(dense_config(site.spec, WIDTH, 0)).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter)

    class Before:
        rows: tuple[Tensor, Tensor] | None = None

        def seen(self) -> int:
            return 0 if self.rows is None else self.rows[0].shape[2]

        def update(self, *new: Tensor) -> tuple[Tensor, Tensor]:
            old = self.rows or tuple(t[:, :, :0] for t in new)
            self.rows = tuple(torch.cat(pair, 2) for pair in zip(old, new, strict=True))
            return self.rows  # type: ignore[return-value]

        def span(self) -> None:
            return None

    x, state = inputs(2, 11)["x"].double(), Before()
    with torch.no_grad():
        parts = [mixer(part, Context(), state) for part in x.split([6, 4, 1], 1)]
        assert float((torch.cat(parts, 1) - mixer(x, Context())).abs().max()) <= 1e-12


def test_another_function_is_carried_with_all_tokens() -> None:
    (site,) = find_attention(made(4, told=False, form="root"), inputs()).sites
    assert isinstance(site.spec.q.proj, Opaque)
    assert site.spec.whole
    assert site.spec.q.first(Scale) is None


def test_growth_at() -> None:
    assert Growth(0.1, 1, 8192).at(8190) == 1.0
    assert Growth(0.1, 1, 8192).at(8191) == pytest.approx(1 + 0.1 * 0.693147, rel=1e-5)
