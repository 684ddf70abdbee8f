"""Streams that are the model's own steps altogether: of several tensors, or rotated alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.install.caching import _placed
from reattend.install.pieces import BOTH, CacheAt
from reattend.passes.rewrite.mla import ToMla
from reattend.passes.rewrite.sparse import ToSparse
from reattend.spec import Opaque
from reattend.weights import dense_config

WIDTH, HEADS = 16, 2


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of [B, H, N, d]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """`merged`: keys of an encoder's tokens beside its own (T5Gemma 2); `values` turn with keys."""

    def __init__(self, merged: bool, values: bool) -> None:
        super().__init__()
        self.merged, self.values = merged, values
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], memory: Tensor) -> Tensor:
        q, k, v = (self.heads(f(x)) for f in (self.q, self.k, self.v))
        q, k = turned(q, *table), turned(k, *table)
        v = turned(v, *table) if self.values else v
        if self.merged:
            k = torch.cat([k, self.heads(self.k(memory))], 2)
            v = torch.cat([v, self.heads(self.v(memory))], 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, **kind: bool) -> None:
        super().__init__()
        self.attn = Attention(**kind)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        place = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3])
        place = torch.cat([place, place * 0.1], -1)
        return x + self.attn(x, (place.cos(), place.sin()), memory)


def inputs(batch: int = 2, length: int = 7, other: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"x": length, "memory": other}
    return {n: torch.randn(batch, m, WIDTH, generator=generator) for n, m in sizes.items()}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ({"merged": True, "values": False}, "qkv"),
        ({"merged": False, "values": True}, "v"),
    ],
)
def test_what_has_no_word_is_carried(kind: dict[str, bool], own: str) -> None:
    torch.manual_seed(0)
    model = Model(**kind).eval()
    (site,) = find_attention(model, inputs()).sites
    assert (site.owner, site.path) == ("module", "attn")
    carried = [n for n in "qkv" if isinstance(getattr(site.spec, n).proj, Opaque)]
    assert "".join(carried) == own
    converted = convert(model, plan="identity", inputs=inputs()).model
    for given in (inputs(), inputs(3, 11, 4)):
        with torch.no_grad():
            assert float((converted(**given) - model(**given)).abs().max()) <= 1e-5
    config = dense_config(site.spec, site.hidden_size, site.memory_size)
    refusal = ToMla().check(config, ToMla.Options())
    assert refusal is not None
    assert "made by the model's own steps" in refusal.reason
    sparse = ToSparse().check(config, ToSparse.Options())
    assert (sparse is not None) == kind["merged"]
    assert sparse is None or "not one for each token" in sparse.reason


def test_a_module_that_writes_both_parts_of_a_cache_is_told_from_one_that_writes_one() -> None:
    own, cross = CacheAt(("c",), "self_attention_cache", 1), CacheAt(("c",), "cross", 1)
    assert _placed([(own, {}), (cross, {})]).part == BOTH
    assert _placed([(own, {}), (own, {})]) == own
