"""Layers mixed by a learned query are recognised and proven; what only looks so is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend import find_attention
from reattend.depth import REASON

WIDTH = 8


class Mixing(nn.Module):
    """Each token averages two results; `asks`: the query is computed from the tokens."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.query, self.up = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        stack = nn.functional.rms_norm(torch.stack([x, self.up(x).relu()], -2), (WIDTH,))
        query = self.query.expand(*x.shape[:2], 1, WIDTH)
        query = query * x[:, :, None] if self.asks else query
        return nn.functional.scaled_dot_product_attention(query, stack, stack)[:, :, 0]


class Model(nn.Module):
    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.mixing, self.end = Mixing(asks), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.mixing(x))


def test_a_learned_query_over_layers_is_proven_and_left() -> None:
    torch.manual_seed(0)
    (told,) = find_attention(Model().eval(), {"x": torch.randn(2, 7, WIDTH)}).refused
    assert (told.path, told.reason, told.verified) == ("mixing", REASON, True)


def test_a_query_of_the_tokens_is_not_that() -> None:
    torch.manual_seed(0)
    (told,) = find_attention(Model(asks=True).eval(), {"x": torch.randn(2, 7, WIDTH)}).refused
    assert not told.verified and told.reason != REASON
