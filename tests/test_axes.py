"""Attention written with five axes: windows and groups of heads beside those of the core."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lone_block import WIDTH, inputs, made
from torch import Tensor, nn

from reattend import convert, find_attention

HEADS, WINDOW = 4, 3


class Windows(nn.Module):
    """Heads before windows, [B, H, W, n, d] (Hiera); a factor per head and what windows add."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.warm = nn.Parameter(torch.rand(HEADS, 1, 1, 1) + 0.5)
        self.register_buffer("near", torch.randn(WINDOW, WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.qkv(x).reshape(b, WINDOW, n // WINDOW, 3, HEADS, WIDTH // HEADS)
        q, k, v = y.permute(3, 0, 4, 2, 1, 5).unbind(0)
        scores = (q * 0.3) @ k.transpose(-1, -2) * self.warm + self.near
        y = (scores.softmax(-1) @ v).transpose(1, 3).reshape(b, -1, WIDTH)
        return self.o(y)


class Groups(nn.Module):
    """Two query heads to each head of keys, which they meet by broadcasting; causal."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, HEADS // 2, -1)).permute(0, 2, 3, 1, 4)
        k, v = (f(x).unflatten(-1, (2, 1, -1)).permute(0, 2, 3, 1, 4) for f in (self.k, self.v))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(later, -torch.inf)
        return self.o((scores.softmax(-1) @ v).permute(0, 3, 1, 2, 4).flatten(2))


class Summed(Groups):
    """Values of two projections: their rows do not tell what an axis is."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, HEADS // 2, -1)).permute(0, 2, 3, 1, 4)
        k, v = (f(x).unflatten(-1, (2, 1, -1)).permute(0, 2, 3, 1, 4) for f in (self.k, self.v))
        v = v + self.k(x).unflatten(-1, (2, 1, -1)).permute(0, 2, 3, 1, 4)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(y.permute(0, 3, 1, 2, 4).flatten(2))


@pytest.mark.parametrize(
    ("block", "kv_heads", "pattern"), [(Windows, 4, "full"), (Groups, 2, "causal")]
)
def test_heads_are_told_from_tokens(
    block: Callable[[], nn.Module], kv_heads: int, pattern: str
) -> None:
    model = made(block)
    (site,) = find_attention(model, inputs(2, 12)).sites
    core = site.spec.core
    assert (core.heads, core.kv_heads, core.qk_head_dim) == (HEADS, kv_heads, WIDTH // HEADS)
    assert core.pattern.kind == pattern
    converted = convert(model, plan="identity", inputs=inputs(2, 12)).model
    for batch, length in ((2, 12), (3, 21)):
        given = inputs(batch, length)
        with torch.no_grad():
            gap = converted(**given) - model(**given)
        assert float(gap.abs().max()) <= 1e-5


def test_an_axis_that_the_values_do_not_tell_is_refused() -> None:
    (refused,) = find_attention(made(Summed), inputs(2, 12)).refused
    assert refused.reason == "scores have 5 axes, and the values do not tell heads from tokens"
