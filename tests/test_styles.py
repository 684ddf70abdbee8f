"""Attention in the styles people write it: found as one block, and equal at another shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.spec import Alibi, RelativeBias, Rotary

D, H, W = 32, 4, 8


class Style(nn.Module):
    """Self-attention of one hand; subclasses differ in how they write it."""

    groups = H

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * self.groups * W)
        self.o = nn.Linear(D, D, bias=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, W)).transpose(1, 2) for t in (self.q(x), k, v))
        return q, k, v

    def bias(self, n: int) -> Tensor | None:
        return None

    def turned(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        q, k = self.turned(q), self.turned(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(W)
        bias = self.bias(x.shape[1])
        probs = (scores if bias is None else scores + bias).softmax(-1)
        return self.o((probs @ v).transpose(1, 2).flatten(2))


class Broadcast(Style):
    """One key and value head meets all queries by broadcasting (arXiv 1911.02150)."""

    groups = 1


class BroadcastFused(Broadcast):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Interleaved(Style):
    """Rotary positions on neighbouring dimensions (arXiv 2104.09864)."""

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * 0.1 ** torch.arange(W // 2)
        a, b = x[..., ::2], x[..., 1::2]
        pair = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(pair, -1).flatten(-2)


class Complex(Style):
    """The same as a product of complex numbers."""

    def turned(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[2])[:, None] * 0.1 ** torch.arange(W // 2)
        turn = torch.polar(torch.ones_like(angle), angle)
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * turn).flatten(-2)


class Linear(Style):
    """ALiBi (arXiv 2108.12409)."""

    def bias(self, n: int) -> Tensor:
        slopes = 0.5 ** torch.arange(1, H + 1)
        place = torch.arange(n)
        hidden = torch.full((n, n), -torch.inf).triu(1)
        return slopes[:, None, None] * (place[None, :] - place[:, None]) + hidden


class Buckets(Style):
    """A learned number per head and clipped distance (T5, arXiv 1910.10683)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, H)

    def bias(self, n: int) -> Tensor:
        place = torch.arange(n)
        distance = (place[None, :] - place[:, None]).clamp(-4, 4) + 4
        made: Tensor = self.table(distance).permute(2, 0, 1)[None]
        return made


class Einops(Style):
    def forward(self, x: Tensor) -> Tensor:
        einops = pytest.importorskip("einops")
        q = einops.rearrange(self.q(x), "b n (h d) -> b h n d", h=H)
        k, v = einops.rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=H)
        probs = torch.einsum("b h i d, b h j d -> b h i j", q, k).mul(W**-0.5).softmax(dim=-1)
        y = torch.einsum("b h i j, b h j d -> b h i d", probs, v)
        made: Tensor = self.o(einops.rearrange(y, "b h n d -> b n (h d)"))
        return made


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(D), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


STYLES = {
    "broadcast": Broadcast, "broadcast, fused": BroadcastFused, "interleaved": Interleaved,
    "complex": Complex, "alibi": Linear, "buckets": Buckets, "einops": Einops,
}  # fmt: skip


@pytest.mark.daily
@pytest.mark.parametrize("style", STYLES)
def test_one_block_and_equal(style: str) -> None:
    torch.manual_seed(0)
    model: Any = Model(STYLES[style]()).eval()
    inputs = {"x": torch.randn(2, 11, D)}
    found = find_attention(model, inputs)
    assert [r.reason for r in found.refused] == []
    (site,) = found.sites
    assert (site.path, site.owner, site.spec.core.heads) == ("attn", "module", H)
    assert site.spec.core.kv_heads == STYLES[style].groups
    rotary = site.spec.q.first(Rotary)
    if style in ("interleaved", "complex"):
        assert isinstance(rotary, Rotary)
        assert rotary.pairing == "interleaved"
    else:
        assert rotary is None
    kinds = {"alibi": Alibi, "buckets": RelativeBias}
    assert isinstance(site.spec.core.bias, kinds.get(style, type(None)))
    converted = convert(model, plan="identity", inputs=inputs).model
    x = torch.randn(3, 17, D)
    with torch.no_grad():
        assert float((converted(x) - model(x)).abs().max()) <= 1e-5


class Gate(nn.Module):
    """A softmax that chooses, not one that averages tokens: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.experts = nn.Linear(D, 3), nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        made = self.experts(x).unflatten(-1, (3, D))
        return torch.einsum("bne,bned->bnd", self.route(x).softmax(-1), made)


def test_a_router_is_no_attention() -> None:
    assert not find_attention(Model(Gate()).eval(), {"x": torch.randn(2, 11, D)}).sites
