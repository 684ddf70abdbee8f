"""Pieces that every gradient kernel of softmax attention is made of.

Probabilities are recomputed from lse (derivation: kernels/README.md).
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reattend.kernels.launching import next_power_of_two, on_device
from reattend.kernels.triton_tiles import LOG2E, soft_cap

ROWS = 16  # of a program that prepares them


@triton.jit
def gradient_rows(
    dy,
    y,
    dlse,
    lse,
    top,
    shift,
    rows,
    E: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What the score gradient needs of every query: lse in base 2 and ``dlse - sum dy y``.

    Grid: (row tiles). dy and y are contiguous [rows, E]. A query that saw nothing gets +inf, so
    that all its probabilities come out as 0.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row, e = row < rows, tl.arange(0, BLOCK_E)
    at = row[:, None] * E + e[None, :]
    inside = is_row[:, None] & (e < E)[None, :]
    dy_tile = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    y_tile = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    log_sum = tl.load(lse + row, mask=is_row, other=float("-inf"))
    moved = tl.load(dlse + row, mask=is_row, other=0.0)
    dead = log_sum == float("-inf")
    tl.store(top + row, tl.where(dead, float("inf"), log_sum * LOG2E), mask=is_row)
    moved = tl.where(dead, 0.0, moved) - tl.sum(dy_tile * y_tile, 1)
    tl.store(shift + row, moved, mask=is_row)


def prepared(grads: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`gradient_rows` of (dy, dlse) and (y, lse): two tensors in the shape of lse, fp32."""
    (dy, dlse), (y, lse) = (tuple(t.contiguous() for t in pair) for pair in (grads, outputs))
    top, shift = (torch.empty_like(lse, dtype=torch.float32) for _ in range(2))
    rows, e = lse.numel(), y.shape[-1]
    if rows == 0:
        return top, shift
    with on_device(y):
        gradient_rows[(-(-rows // ROWS),)](
            dy, y, dlse.float(), lse, top, shift, rows,
            E=e, BLOCK_ROWS=ROWS, BLOCK_E=next_power_of_two(e),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return top, shift


@triton.jit
def score_gradient(s, dp, top, shift, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Probabilities, and the gradient of q . k without the factor ``scale``.

    ``s`` and ``dp`` are the products of queries with keys and of dy with values; ``top`` and
    ``shift`` (see `gradient_rows`) are broadcast along the keys. Nothing is hidden here.
    """
    s = s * scale
    slope = 1.0
    if HAS_SOFTCAP:
        s = soft_cap(s, softcap)
        slope = 1.0 - (s / softcap) * (s / softcap)
    p = tl.exp2(s * LOG2E - top)
    return p, p * (dp + shift) * slope
