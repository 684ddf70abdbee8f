"""A binding that reads the wrong argument, or reads it wrongly, is caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.callcheck import call_check, mask_of
from reattend.finder import AttentionSite, FoundAttention
from reattend.locate import Place
from reattend.ownercheck import Watched
from reattend.passes.find.sites import Found

D, N = 16, 9


class Attention(nn.Module):
    """A mask of whole numbers [B, 1, N, N], as DeBERTa passes it, and one that is not read."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, seen: Tensor, unread: Tensor) -> tuple[Tensor, None]:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.bool())
        return self.out(y.transpose(1, 2).flatten(2)), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        seen = attention_mask[:, None, None] * attention_mask[:, None, :, None]
        return x + self.attn(x, seen, seen.float())[0]


@pytest.fixture(scope="module")
def found() -> FoundAttention:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, N, D), "attention_mask": torch.ones(2, N, dtype=torch.long)}
    return find_attention(Model().eval(), inputs)


def checked(found: FoundAttention, **change: Any) -> str:
    site: AttentionSite = found.sites[0]
    assert site.binding is not None
    place = Place(site.path, site.binding.model_copy(update=change))
    watched = Watched(found.capture, {site.path})
    item = Found(site.spec, site.region, site.follows_padding)
    mask = mask_of(found.capture, item, watched.inputs(None, True))
    return call_check(found.capture, item, place, watched.call(site.path, None, True), mask)


def test_a_mask_of_whole_numbers_hides(found: FoundAttention) -> None:
    assert checked(found) == ""
    model: Any = found.capture.model
    inputs = dict(found.capture.inputs)
    converted = convert(model, plan="identity", inputs=inputs).model
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, -3:] = 0
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        gap = (converted(**inputs) - model(**inputs))[real]
    assert float(gap.abs().max()) <= 1e-6


@pytest.mark.parametrize("change", [{"mask": None}, {"mask": ("unread",)}, {"mask_hides": True}])
def test_a_mask_read_wrongly_is_caught(found: FoundAttention, change: dict[str, Any]) -> None:
    assert "an argument is not what it seems" in checked(found, **change)


def test_a_block_read_wrongly_is_caught(found: FoundAttention) -> None:
    site = found.sites[0]
    turned = replace(site.spec, core=replace(site.spec.core, scale=2 * site.spec.core.scale))
    item = Found(turned, site.region, site.follows_padding)
    watched = Watched(found.capture, {site.path})
    place = Place(site.path, site.binding)
    call = watched.call(site.path, None, True)
    mask = mask_of(found.capture, item, watched.inputs(None, True))
    assert "differs by" in call_check(found.capture, item, place, call, mask)
