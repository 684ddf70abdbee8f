"""Two calls with the same queries and keys are one core with wider values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from reattend import find_attention
from reattend.passes.base import CORES
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op


class Twice(nn.Module):
    """softmax(q k) v1 - 0.3 softmax(q k) v2, keys repeated to the heads in each call."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.qkv, self.out, self.how = nn.Linear(16, 32), nn.Linear(8, 16), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, w = self.qkv(x).unflatten(-1, (4, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.how == "turned":
            second = k.flip(-1)
        else:
            second = k
        a = F.scaled_dot_product_attention(q, k * 2.0, v, is_causal=True)
        if self.how == "chained":
            w = a
        scale = 0.1 if self.how == "scaled" else None
        b = F.scaled_dot_product_attention(q, second * 2.0, w, is_causal=True, scale=scale)
        return self.out((a - 0.3 * b).transpose(1, 2).flatten(2))


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("how", "cores"), [("", 1), ("turned", 2), ("scaled", 2), ("chained", 2)])
def test_only_equal_weights_are_merged(how: str, cores: int) -> None:
    module = Twice(how).eval()
    gm = torch.export.export(module, (X,), strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    normalize(gm)
    left = [n for n in gm.graph.nodes if is_op(n, attention)]
    assert len(left) == cores
    assert torch.allclose(gm(X), module(X), atol=1e-6)
    assert left[0].meta.get(CORES, 1) == 3 - cores


def test_the_merged_block_is_found_and_counts_twice() -> None:
    torch.manual_seed(0)
    found = find_attention(Twice().eval(), {"x": torch.randn(2, 7, 16)})
    (site,) = found.sites
    assert site.verified and site.cores == 2
    assert (site.spec.core.qk_head_dim, site.spec.core.v_head_dim) == (4, 8)
