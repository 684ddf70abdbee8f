"""Windows cut behind a projection, and parts of a sequence, move in front of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lone_block import WIDTH, inputs, made
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.spec import Opaque

HEADS, WINDOW = 4, 3


class Windows(nn.Module):
    """One projection for queries, keys and values; then windows of three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.qkv(x).view(b, n // WINDOW, WINDOW, 3, HEADS, WIDTH // HEADS).flatten(0, 1)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(0.3 * q, k, v, scale=1.0)
        return self.o(y.transpose(1, 2).reshape(b, n, WIDTH))


class Half(nn.Module):
    """Only the first half of the sequence attends; the rest passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(2, 2)[0]
            for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.cat([self.o(y.transpose(1, 2).flatten(2)), x.chunk(2, 1)[1]], 1)


class Mixed(Windows):
    """Neighbours are added before the windows: no token is read by itself."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.qkv(x)
        y = y + y.roll(1, 1)
        q, k, v = y.view(-1, WINDOW, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, WIDTH))


@pytest.mark.parametrize("block", [Windows, Half])
def test_regrouped_tokens_are_one_block(block: Callable[[], nn.Module]) -> None:
    model = made(block)
    (site,) = find_attention(model, inputs(2, 12)).sites
    assert (site.owner, site.spec.kind, site.path) == ("module", "self", "attn")
    converted = convert(model, plan="identity", inputs=inputs(2, 12)).model
    for batch, length in ((2, 12), (3, 12)):
        given = inputs(batch, length)
        with torch.no_grad():
            gap = converted(**given) - model(**given)
        assert float(gap.abs().max()) <= 1e-5


def test_tokens_that_are_mixed_do_not_move() -> None:
    """The streams are the model's own steps then, over all tokens."""
    model = made(Mixed)
    (site,) = find_attention(model, inputs(2, 12)).sites
    assert site.spec.whole
    assert all(isinstance(s.proj, Opaque) for s in (site.spec.q, site.spec.k, site.spec.v))
    converted = convert(model, plan="identity", inputs=inputs(2, 12)).model
    given = inputs(3, 15)
    with torch.no_grad():
        assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5
