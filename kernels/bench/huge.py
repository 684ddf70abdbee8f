"""Are addresses right where one tensor has more than 2^31 numbers? In bf16, which is timed.

Of a cache only the last rows are valid, so that little is computed; a state forgets what came long
before. The oracle is the op's formula in fp64 on those rows alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from cases import Case
from correctness import compared, ops_of, tensors, y_limit
from torch import Tensor

from reattend.kernels.linear_attention import reference as linear_reference
from reattend.kernels.routed_attention import reference as routed_reference
from reattend.kernels.sparse_attention import BlockLayout
from reattend.kernels.sparse_attention import reference as sparse_reference

ROWS, LONG = (1 << 21) + 999, (1 << 18) + 300
HUGE = (
    Case("gqa, 2^31 numbers", "attention", 1, 16, 8, 3, ROWS, 128),
    Case("gqa prefill, 2^31 numbers", "attention", 1, 16, 8, 300, ROWS, 128),
    Case("mla, 2^31 numbers", "latent_attention", 1, 16, 1, 3, 2 * ROWS, 512, 64),
    Case("mla prefill, 2^31 numbers", "latent_attention", 1, 16, 1, 300, 2 * ROWS, 512, 64),
    Case("sparse, 2^31 numbers", "sparse_attention", 1, 16, 8, 3, ROWS, 128),
    Case("sparse prefill, 2^31 numbers", "sparse_attention", 1, 16, 8, 300, ROWS, 128),
    Case("routed, 2^31 numbers", "routed_attention", 1, 16, 8, 3, ROWS, 128),
    Case("routed prefill, 2^31 numbers", "routed_attention", 1, 16, 8, 300, ROWS, 128),
    Case("linear, 2^31 numbers", "linear_attention", 1, 64, 64, LONG, LONG, 128, decay="head"),
    Case(
        "linear featured, 2^31 numbers", "linear_attention", 1, 64, 64, LONG, LONG, 128,
        decay="feature",
    ),
)  # fmt: skip
SEEN = 1500  # valid rows of a cache
LAST, READ = 64, 256  # tokens that are compared, and that tell in them, of a state
OPS = torch.ops.reattend
dtype = torch.bfloat16


def huge_error(case: Case, device: str) -> float:
    """Error of one case, in units of the allowed one."""
    with torch.no_grad():
        return (_state if case.op == "linear_attention" else _cache)(case, device)


def _rest(case: Case, device: str) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    """Op, formula, and what both take before and after the bounds of the rows."""
    scale, make = (case.d + case.rope) ** -0.5, torch.Generator().manual_seed(0)
    if case.op == "sparse_attention":
        mask = (torch.rand(1, SEEN, SEEN, generator=make) < 0.4).tril()
        mask[:, :, :2] = True
        layout = BlockLayout.from_mask(mask, torch.zeros(case.h, dtype=torch.int64), 64).to(device)
        formula: Any = sparse_reference.sparse_attention
        return OPS.sparse_attention, formula, layout.tensors, (layout.block, 0, scale, 0.0)
    if case.op == "routed_attention":
        active = torch.rand(1, case.g, case.n, generator=make) < 0.6
        active[0, 0] = True
        both = (OPS.routed_attention, routed_reference.routed_attention)
        op, formula = (partial(one, scale=scale) for one in both)
        return op, formula, (active.to(device),), ()
    op, formula = (partial(one, scale=scale) for one in ops_of(case))
    return op, formula, (), ()


def _cache(case: Case, device: str) -> float:
    inputs = tensors(case, dtype, device)
    end = torch.full((1,), case.m, device=device)
    op, formula, before, after = _rest(case, device)
    y, lse = op(*inputs, *before, end - SEEN, end, *after)
    new = 2 if case.op == "latent_attention" else 1
    small = (*inputs[:new], *(x[..., -SEEN:, :] for x in inputs[new:]))
    zero = torch.zeros_like(end)
    want, want_lse = formula(*(x.double() for x in small), *before, zero, zero + SEEN, *after)
    return compared(y, lse, want, want_lse, dtype)


def _state(case: Case, device: str) -> float:
    make = torch.Generator(device=device).manual_seed(0)
    shape = (1, case.n, case.h, case.d)  # token by token: heads and tokens are far apart

    def draw() -> Tensor:
        return torch.randn(shape, generator=make, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = draw(), draw(), draw()
    decay = torch.full(shape[: 4 if case.decay == "feature" else 3], -0.5, device=device)
    decay = decay.transpose(1, 2)
    y, state = OPS.linear_attention(q, k, v, decay, None, 0, 1, False)
    formula: Any = linear_reference.linear_attention
    wide = [x[:, :, -READ:].double() for x in (q, k, v, decay)]
    want, want_state = formula(*wide, None, 0, 1, False)
    pairs = ((y[:, :, -LAST:], want[:, :, -LAST:]), (state, want_state))
    apart = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]
    return max(apart) / y_limit(dtype) if all(x == x for x in apart) else float("inf")
