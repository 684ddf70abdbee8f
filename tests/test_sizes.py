"""Owners that are told height and width: told apart on an oblong image, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention

D = 16


class Reduced(nn.Module):
    """Keys and values from a smaller image, as in PVT (arXiv 2102.12122)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.shrink = nn.Conv2d(D, D, 2, 2)

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, None]:
        small = self.shrink(x.transpose(1, 2).reshape(x.shape[0], D, height, width))
        q, k, v = (
            t.unflatten(-1, (2, -1)).transpose(1, 2)
            for t in (self.q(x), *self.kv(small.flatten(2).transpose(1, 2)).chunk(2, -1))
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)), None


class Images(nn.Module):
    """`fixed`: one size of image only."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.embed, self.attn = nn.Conv2d(3, D, 4, 4), Reduced()
        self.place = nn.Parameter(torch.randn(1, 64, D)) if fixed else None

    def forward(self, pixels: Tensor) -> Tensor:
        image = self.embed(pixels)
        height, width = image.shape[-2:]
        x = image.flatten(2).transpose(1, 2)
        if self.place is not None:
            x = x + self.place
        return x + self.attn(x, height, width)[0]


def built(fixed: bool) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Images(fixed).eval(), {"pixels": torch.randn(2, 3, 32, 32)}


def test_height_and_width_are_told_apart() -> None:
    model, inputs = built(fixed=False)
    (site,) = find_attention(model, inputs).sites
    assert site.owner == "module"
    around = site.binding.around  # type: ignore[union-attr]
    told = [f.path for f in around.before["memory"].feeds if f.path[0] != "x"]  # type: ignore[union-attr]
    assert sorted(told) == [("height",), ("width",)]
    converted = convert(model, plan="identity", inputs=inputs).model
    for shape in ((32, 32), (48, 16), (16, 64)):
        pixels = torch.randn(3, 3, *shape)
        with torch.no_grad():
            assert float((converted(pixels) - model(pixels)).abs().max()) <= 1e-5


@pytest.mark.parametrize("fixed", [True, False])
def test_sizes_are_never_guessed(fixed: bool) -> None:
    model, inputs = built(fixed)
    converted = convert(model, plan="identity", inputs=inputs).model
    with torch.no_grad():
        assert float((converted(**inputs) - model(**inputs)).abs().max()) <= 1e-5
