"""Every mixer of the linear family: chunks and steps equal one shot, from as many bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import config, dense
from test_flowing import OPTIONS as FLOWING
from test_linear import WAYS, gap, inputs, linear
from test_selective import selective
from test_sparse_linear import OPTIONS as SLA
from test_sparse_linear import sla
from torch import Tensor

from reattend.mixers.base import Context

FAMILY: dict[str, Any] = {
    **{name: lambda block, way=way: linear(block, **way) for name, way in WAYS.items()},
    "mamba2": selective,
    "flowformer": lambda block: linear(block, **FLOWING),
    "sla": lambda block: sla(block, **SLA),
}


class HeldBytes:
    """The plainest state."""

    def __init__(self) -> None:
        self.tensors: Any = None
        self.tokens = 0

    def held(self) -> Any:
        return self.tensors

    def hold(self, tensors: Any, tokens: int) -> None:
        self.tensors, self.tokens = tensors, self.tokens + tokens

    def update(self, first: Tensor, second: Tensor) -> Any:
        raise AssertionError

    def seen(self) -> int:
        return self.tokens

    def span(self) -> None:
        return None


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", FAMILY)
def test_chunks_and_steps_equal_one_shot_and_hold_as_many_bytes(
    name: str, dtype: torch.dtype, limit: float
) -> None:
    mixer = FAMILY[name](dense(config())).to(dtype)
    x, real = inputs(29, (0, 6, 11))
    x = x.to(dtype)
    real[2, 20] = False  # padding in the middle moves nothing either
    position = (real.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = mixer(x, Context(mask=real, position_BN=position))
        sizes = set()
        for cuts in ((29,), (2, 1, 5, 5, 16), (1,) * 29):
            state, at, parts = HeldBytes(), 0, []
            for n in cuts:
                part = slice(at, at + n)
                ctx = Context(mask=real[:, : at + n], position_BN=position[:, part])
                parts.append(mixer(x[:, part], ctx, state))
                at += n
                held = sum(t.nbytes for t in state.tensors if t.is_floating_point())
                assert held <= 3 * mixer.config.held_after(at) * dtype.itemsize
            sizes.add(held)
            assert gap(torch.cat(parts, 1), whole, real) <= limit
    assert sizes == {3 * mixer.config.held_after(29) * dtype.itemsize}
