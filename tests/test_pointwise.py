"""Projections written as convolutions of kernel 1 over [B, D, N], in groups or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """[B, N, D] -> [B, N, D]; `stride` belongs to the keys and leaves tokens out."""

    def __init__(self, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.q, self.v = (nn.Conv1d(WIDTH, WIDTH, 1, groups=groups) for _ in range(2))
        self.k = nn.Conv1d(WIDTH, WIDTH, 1, groups=groups, stride=stride)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        q, k, v = (
            f(turned).unflatten(1, (HEADS, -1)).transpose(2, 3) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v[:, :, : k.shape[2]])
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_kernel_one_are_projections(groups: int) -> None:
    torch.manual_seed(0)
    model = Model(Block(groups)).eval()
    (site,) = find_attention(model, inputs(2, 11)).sites
    assert (site.spec.kind, site.owner) == ("self", "module")
    converted = convert(model, plan="identity", inputs=inputs(2, 11)).model
    for batch, length in ((2, 11), (3, 7)):
        given = inputs(batch, length)
        with torch.no_grad():
            assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5


def test_one_that_leaves_tokens_out_is_none() -> None:
    seen = find_attention(Model(Block(1, stride=2)).eval(), inputs(2, 12))
    assert not seen.sites
    assert "no projection behind" in seen.refused[0].reason
