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


class Read(nn.Module):
    """The result of a block is one of what the next mixing chooses from, without a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mixing, self.end = Mixing(asks=False), nn.Linear(WIDTH, WIDTH)
        self.mixing.up = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.mixing(self.attn(x, x, x, need_weights=False)[0]))


def test_a_blocks_result_is_not_its_keys() -> None:
    torch.manual_seed(0)
    found = find_attention(Read().eval(), {"x": torch.randn(2, 7, WIDTH)})
    assert [(s.path, s.verified) for s in found.sites] == [("attn", True)]
    assert [(r.path, r.verified) for r in found.refused] == [("mixing", True)]
