"""Fused attention calls become the normal form, active dropout excepted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from reattend.passes.normalize.cores import FuseSdpa
from reattend.passes.normalize.forms import attention, is_op

Q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
ONE = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(1))
TWO = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(2))
HIDES = torch.ones(5, 5).tril().bool()


class Call(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k.tanh(), **self.how)


def fused(module: nn.Module, *args: Tensor) -> tuple[fx.GraphModule, Any]:
    gm = torch.export.export(module, args, strict=False).module()
    assert isinstance(gm, fx.GraphModule)
    return gm, FuseSdpa()(gm)


@pytest.mark.parametrize(
    ("how", "keys", "scale"),
    [
        ({}, Q, 8**-0.5),
        ({"scale": 0.3, "attn_mask": HIDES}, Q, 0.3),
        ({"is_causal": True}, ONE, 8**-0.5),
        ({"is_causal": True, "enable_gqa": True}, TWO, 8**-0.5),
    ],
)
def test_the_normal_form_computes_the_same(how: Any, keys: Tensor, scale: float) -> None:
    module = Call(**how)
    gm, result = fused(module, Q, keys)
    (core,) = (n for n in gm.graph.nodes if is_op(n, attention))
    assert result.rewrites == 1 and core.args[4] == pytest.approx(scale)
    shapes = [core.args[i].meta["val"].shape for i in (0, 1, 2)]  # type: ignore[union-attr]
    assert [s[1] for s in shapes] == [4, 4, 4]
    assert torch.allclose(gm(Q, keys), module(Q, keys), atol=1e-6)


def test_dropout_at_work_is_refused() -> None:
    gm, result = fused(Call(dropout_p=0.5), Q, Q)
    assert not [n for n in gm.graph.nodes if is_op(n, attention)]
    ((_, why),) = result.refused
    assert "eval()" in why
