"""Scores hidden by a product and a sum with a table of zeros and ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from reattend import find_attention
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op


class Blended(nn.Module):
    def __init__(self, table: str = "") -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 24), nn.Linear(8, 16)
        seen = torch.ones(32, 32).tril()
        self.register_buffer("seen", seen * 0.5 if table == "halves" else seen)
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * 0.5
        b = self.seen[: x.shape[1], : x.shape[1]]
        if self.table == "of the input":
            b = (x @ x.transpose(1, 2) > -9.0).float()[:, None]
        scores = scores * b + -1e4 * (1 - b)
        y = torch.softmax(scores, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("table", "cores"), [("", 1), ("halves", 0), ("of the input", 0)])
def test_only_stored_zeros_and_ones_hide(table: str, cores: int) -> None:
    torch.manual_seed(0)
    module = Blended(table).eval()
    gm = torch.export.export(module, (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    refused = {r.name: r.refused for r in normalize(gm)}["blend-to-where"]
    assert len([n for n in gm.graph.nodes if is_op(n, attention)]) == cores
    assert len(refused) == 1 - cores
    assert torch.allclose(gm(X), module(X), atol=1e-6)


def test_the_block_is_causal_and_proven() -> None:
    torch.manual_seed(0)
    (site,) = find_attention(Blended().eval(), {"x": torch.randn(2, 7, 16)}).sites
    assert site.verified and site.spec.core.pattern.kind == "causal"
