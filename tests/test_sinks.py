"""Sinks as a factor behind a core, and sinks that every query computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from reattend import convert, find_attention
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op


class Sunk(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.qkv, self.out, self.how = nn.Linear(16, 24), nn.Linear(8, 16), how
        self.sinks = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        n = x.shape[1]
        scores = q @ k.transpose(-1, -2) * 0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e30)
        other = scores * 2.0 if self.how == "other scores" else scores
        total = torch.logsumexp(other, -1)
        factor = (total - self.sinks.view(1, -1, 1)).float().sigmoid()
        core = torch.softmax(scores, -1) @ v
        y = core * factor[..., None]
        if self.how == "read twice":
            y = y + core
        return self.out(y.transpose(1, 2).flatten(2))


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["", "other scores", "read twice"])
def test_only_the_factor_of_its_own_scores(how: str) -> None:
    torch.manual_seed(0)
    module = Sunk(how).eval()
    gm = torch.export.export(module, (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    normalize(gm)
    sunk = [n for n in gm.graph.nodes if is_op(n, attention) and n.args[7] is not None]
    assert len(sunk) == (how == "")
    assert torch.allclose(gm(X), module(X), atol=1e-6)


def test_the_block_is_proven() -> None:
    torch.manual_seed(0)
    found = find_attention(Sunk().eval(), {"x": torch.randn(2, 7, 16)})
    assert [(s.verified, s.spec.core.sinks) for s in found.sites] == [(True, "sinks")]


class Asked(nn.Module):
    """Every query has a sink of its own, computed from its token (Inkling 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.sink, self.out = nn.Linear(16, 24), nn.Linear(16, 2), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        n = x.shape[1]
        scores = q @ k.transpose(-1, -2) * 0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e30)
        sinks = self.sink(x).transpose(1, 2).unsqueeze(-1)
        shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return self.out((shares @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Asked(), Asked()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def test_a_sink_of_every_query_is_a_logit_of_zero_and_a_term() -> None:
    torch.manual_seed(0)
    model, x = Stack().eval(), torch.randn(2, 7, 16)
    found = find_attention(model, {"x": x})
    assert [(s.verified, s.spec.core.sinks) for s in found.sites] == [(True, "")] * 2
    converted = convert(model, plan="identity", inputs={"x": x}).model
    with torch.no_grad():
        longer = torch.randn(3, 11, 16)
        assert torch.allclose(converted(longer), model(longer), atol=1e-6)
