"""A softmax written out by hand is one, and what only resembles it is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from reattend import find_attention
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, weigh: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 24), nn.Linear(8, 16)
        self.weigh = weigh

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        probs = self.weigh((q @ k.transpose(-1, -2) * 0.5).masked_fill(~seen, -1e9))
        return self.out((probs @ v).transpose(1, 2).flatten(2))


def cores(weigh: Callable[[Tensor], Tensor]) -> list[fx.Node]:
    torch.manual_seed(0)
    module = Block(weigh).eval()
    gm = torch.export.export(module, (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    normalize(gm)
    assert torch.allclose(gm(X), module(X), atol=1e-6)
    return [n for n in gm.graph.nodes if is_op(n, attention)]


def shifted(s: Tensor) -> Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def by_logsumexp(s: Tensor) -> Tensor:
    return torch.exp(s - s.logsumexp(-1, keepdim=True))


@pytest.mark.parametrize(
    "weigh", [shifted, by_logsumexp, lambda s: s.exp() / s.exp().sum(dim=-1, keepdim=True)]
)
def test_spellings(weigh: Callable[[Tensor], Tensor]) -> None:
    # two exponentials of one value are two nodes: only one that is its own sum is a softmax
    assert len(cores(weigh)) == (weigh in (shifted, by_logsumexp))


@pytest.mark.parametrize(
    "weigh",
    [
        lambda s: s.exp() / (s.exp().sum(-1, keepdim=True) + 1e-2),
        lambda s: torch.exp(s - 0.5 * s.logsumexp(-1, keepdim=True)),
        lambda s: torch.sub(s, s.logsumexp(-1, keepdim=True), alpha=2).exp(),
        lambda s: s.sigmoid() / s.sigmoid().sum(-1, keepdim=True),
    ],
)
def test_other_weights_are_none(weigh: Callable[[Tensor], Tensor]) -> None:
    assert cores(weigh) == []


def test_over_queries_it_is_no_attention() -> None:
    def other(s: Tensor) -> Tensor:
        e = s.exp()
        return e / e.sum(-2, keepdim=True)

    assert cores(other) == []


def test_the_block_is_proven() -> None:
    (site,) = find_attention(Block(shifted).eval(), {"x": X}).sites
    assert site.verified and site.spec.core.pattern.kind == "causal"
