"""Registration of `reattend::sparse_attention` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reattend.errors import ArgumentError
from reattend.kernels.autocast import register_autocast
from reattend.kernels.checks import Shape, check_cache, check_rows, check_scalars, same_size
from reattend.kernels.core import Rule, compute_dtype
from reattend.kernels.lazy_triton import load_launch
from reattend.kernels.sparse_attention import blocked
from reattend.kernels.sparse_attention.blocked import Inputs
from reattend.kernels.sparse_attention.layout import check_layout

NAME = "reattend::sparse_attention"
_ARGUMENTS = (
    "Tensor q_BHNd, Tensor k_BGMd, Tensor v_BGMe, Tensor row_ptr, Tensor col, Tensor tile,"
    " Tensor tiles, Tensor head_layout, Tensor kv_start_B, Tensor kv_len_B, int block,"
    " SymInt first, float scale, float softcap=0.0"
)


def _inputs(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Inputs, Rule]:
    """Positional arguments of the op, put together; softcap may be missing."""
    *tensors, block, first, scale, softcap = (*rest, 0.0) if len(rest) == 10 else rest
    x = Inputs(q, k, v, tuple(tensors[:5]), (tensors[5], tensors[6]), block, first)
    return x, Rule(scale, False, 0, softcap)


def check(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    layout: tuple[Tensor, ...],
    rows: tuple[Tensor, Tensor],
    block: int,
    first: int,
    softcap: float,
) -> None:
    """Raise ArgumentError where shapes or dtypes break the contract of the op."""
    check_cache(NAME, q_BHNd, k_BGMd, v_BGMe)
    same_size(NAME, q_BHNd.shape[0], k_BGMd.shape[0], "the batches of q and k")
    check_rows(NAME, q_BHNd, *rows)
    check_scalars(NAME, 0, softcap)
    row_ptr, col, tile, tiles, head_layout = layout
    check_layout(row_ptr, col, tile, tiles, head_layout, block, first)
    same_size(NAME, col.shape[0], tile.shape[0], "the lengths of col and tile")
    same_size(NAME, head_layout.shape[0], q_BHNd.shape[1], "the heads of the layout and of q")
    if row_ptr.device != q_BHNd.device:
        raise ArgumentError(
            f"{NAME}: the layout must be on the device of the queries",
            why=f"{row_ptr.device} and {q_BHNd.device}",
            next_step="move it with BlockLayout.to",
        )


@torch.library.custom_op(NAME, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def sparse_attention(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    tile: Tensor,
    tiles: Tensor,
    head_layout: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block: int,
    first: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `reattend.kernels.sparse_attention.reference` for the meaning of every argument.

    Raises:
        ArgumentError: shapes or dtypes do not fit. On a CPU also where a query at a position that
            is not padding has no row in the layout; a GPU gives zeros there.
    """
    layout, rows = (row_ptr, col, tile, tiles, head_layout), (kv_start_B, kv_len_B)
    check(q_BHNd, k_BGMd, v_BGMe, layout, rows, block, first, softcap)
    x = Inputs(q_BHNd, k_BGMd, v_BGMe, layout, rows, block, first)
    return blocked.forward(x, Rule(scale, False, 0, softcap))


@sparse_attention.register_kernel("cuda")
def _cuda(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    x, rule = _inputs(q, k, v, *rest)
    check(q, k, v, x.layout, x.rows, x.block, x.first, rule.softcap)
    launch = load_launch("reattend.kernels.sparse_attention.launch")
    config = launch.config_for(x, "forward") if rule.scale > 0 else None
    if config is None:  # fp64, very wide heads, a GPU no kernel is shipped for, a scale of 0
        return blocked.forward(x, rule)
    result: tuple[Tensor, Tensor] = launch.launch(x, rule, config)
    return result


@sparse_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    tile: Tensor,
    tiles: Tensor,
    head_layout: Tensor,
    start: Tensor,
    length: Tensor,
    block: int,
    first: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    layout = (row_ptr, col, tile, tiles, head_layout)
    check(q, k, v, layout, (start, length), block, first, softcap)
    b, h, n, _ = q.shape
    y = q.new_empty(b, h, n, v.shape[3])
    return y, q.new_empty(b, h, n, dtype=compute_dtype(q.dtype))


@torch.library.custom_op(
    "reattend::sparse_attention_backward",
    mutates_args=(),
    schema="(Tensor dy_BHNe, Tensor dlse_BHN, Tensor y_BHNe, Tensor lse_BHN,"
    f" {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def sparse_attention_backward(
    dy_BHNe: Tensor,
    dlse_BHN: Tensor,
    y_BHNe: Tensor,
    lse_BHN: Tensor,
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    tile: Tensor,
    tiles: Tensor,
    head_layout: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block: int,
    first: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from those of y and lse."""
    layout, rows = (row_ptr, col, tile, tiles, head_layout), (kv_start_B, kv_len_B)
    x = Inputs(q_BHNd, k_BGMd, v_BGMe, layout, rows, block, first)
    grads, outputs = (dy_BHNe, dlse_BHN), (y_BHNe, lse_BHN)
    return blocked.backward(grads, outputs, x, Rule(scale, False, 0, softcap))


@sparse_attention_backward.register_kernel("cuda")
def _cuda_backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    x, rule = _inputs(*inputs)
    launch = load_launch("reattend.kernels.sparse_attention.launch")
    configs = (launch.config_for(x, "dq"), launch.config_for(x, "dkv"))
    if None in configs:
        return blocked.backward((dy, dlse), (y, lse), x, rule)
    result: tuple[Tensor, Tensor, Tensor] = launch.launch_backward(
        (dy, dlse), (y, lse), x, rule, configs
    )
    return result


@sparse_attention_backward.register_fake
def _fake_backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.scalars = inputs[10:]


def _backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = sparse_attention_backward(dy, dlse, *ctx.saved_tensors, *ctx.scalars)
    return dq, dk, dv, *[None] * (7 + len(ctx.scalars))


sparse_attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("sparse_attention")


def _pairs(q: Any, row_ptr: Any, col: Any, block: int) -> int:
    """Pairs of every row of the batch, were its queries spread evenly over the layout's rows."""
    entries = row_ptr[0] * (row_ptr[1] - 1)
    return int(q[0] * q[1] * q[2] * block * col[0] // entries)


@register_flop_formula(torch.ops.reattend.sparse_attention)
def sparse_attention_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    row_ptr: Shape,
    col: Shape,
    tile: Shape,
    tiles: Shape,
    head_layout: Shape,
    start: Shape,
    length: Shape,
    block: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """2 (d + e) per pair of the blocks read; what tiles hide is counted, as torch's masks are."""
    return 2 * _pairs(q, row_ptr, col, block) * (q[3] + v[3])


@register_flop_formula(torch.ops.reattend.sparse_attention_backward)
def sparse_attention_backward_flops(
    dy: Shape,
    dlse: Shape,
    y: Shape,
    lse: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    row_ptr: Shape,
    col: Shape,
    tile: Shape,
    tiles: Shape,
    head_layout: Shape,
    start: Shape,
    length: Shape,
    block: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Recomputed scores, dp, dv, dq, dk: 2 (3 d + 2 e) per pair of the blocks read."""
    return 2 * _pairs(q, row_ptr, col, block) * (3 * q[3] + 2 * v[3])
