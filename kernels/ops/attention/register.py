"""Registration of `reattend::attention` and `reattend::attention_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reattend.kernels.attention import reference
from reattend.kernels.autocast import register_autocast
from reattend.kernels.checks import (
    Shape,
    check_cache,
    check_rows,
    check_scalars,
    check_table,
    same_size,
)
from reattend.kernels.core import Rule, compute_dtype
from reattend.kernels.lazy_triton import load_launch

NAME = "reattend::attention"
_SCALARS = "float scale, bool causal=True, int sliding_window=0, float softcap=0.0"
_TENSORS = "Tensor kv_start_B, Tensor kv_len_B, Tensor? block_table_BP=None"


def check(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None,
    *,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Raise ArgumentError where shapes or dtypes break the contract of the op."""
    check_cache(NAME, q_BHNd, k_BGMd, v_BGMe)
    if block_table_BP is None:
        same_size(NAME, q_BHNd.shape[0], k_BGMd.shape[0], "the batches of q and k")
    check_rows(NAME, q_BHNd, kv_start_B, kv_len_B)
    check_table(NAME, q_BHNd.shape[0], block_table_BP)
    check_scalars(NAME, sliding_window, softcap)


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    schema=f"(Tensor q_BHNd, Tensor k_BGMd, Tensor v_BGMe, {_TENSORS}, *, {_SCALARS})"
    " -> (Tensor, Tensor)",
)
def attention(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `reattend.kernels.attention.reference.attention` for the meaning of every argument."""
    check(
        q_BHNd,
        k_BGMd,
        v_BGMe,
        kv_start_B,
        kv_len_B,
        block_table_BP,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    rule = Rule(scale, causal, sliding_window, softcap)
    return reference.forward(q_BHNd, k_BGMd, v_BGMe, kv_start_B, kv_len_B, block_table_BP, rule)


@attention.register_kernel("cuda")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    inputs = (q, k, v, start, length, table)
    check(*inputs, sliding_window=sliding_window, softcap=softcap)
    rule = Rule(scale, causal, sliding_window, softcap)
    launch = load_launch("reattend.kernels.attention.launch")
    config = launch.config_for(q, v) if scale > 0 else None
    if config is None:  # fp64, very wide heads, a GPU no kernel is shipped for, a scale of 0
        return reference.forward(*inputs, rule)
    done: tuple[Tensor, Tensor] = launch.launch(*inputs, rule, config)
    return done


@attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check(q, k, v, start, length, table, sliding_window=sliding_window, softcap=softcap)
    b, h, n, _ = q.shape
    y = q.new_empty(b, h, n, v.shape[3])
    return y, q.new_empty(b, h, n, dtype=compute_dtype(q.dtype))


@torch.library.custom_op(
    "reattend::attention_backward",
    mutates_args=(),
    schema="(Tensor dy_BHNe, Tensor dlse_BHN, Tensor y_BHNe, Tensor lse_BHN, Tensor q_BHNd,"
    f" Tensor k_BGMd, Tensor v_BGMe, {_TENSORS}, *, {_SCALARS}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    dy_BHNe: Tensor,
    dlse_BHN: Tensor,
    y_BHNe: Tensor,
    lse_BHN: Tensor,
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from those of y and lse."""
    return reference.backward(
        (dy_BHNe, dlse_BHN),
        (y_BHNe, lse_BHN),
        (q_BHNd, k_BGMd, v_BGMe, kv_start_B, kv_len_B, block_table_BP),
        Rule(scale, causal, sliding_window, softcap),
    )


@attention_backward.register_kernel("cuda")
def _cuda_backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    start: Tensor, length: Tensor, table: Tensor | None = None, *,
    scale: float, causal: bool = True, sliding_window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(scale, causal, sliding_window, softcap)
    launch = load_launch("reattend.kernels.attention.launch_backward")
    configs = launch.configs_for(q, v) if table is None else None
    if configs is None:  # pages, fp64, very wide heads, a GPU no kernel is shipped for
        given = (q, k, v, start, length, table)
        return reference.backward((dy, dlse), (y, lse), given, rule)
    inputs = (q, k, v, start, length)
    done: tuple[Tensor, Tensor, Tensor] = launch.launch_backward(
        (dy, dlse), (y, lse), inputs, rule, configs
    )
    return done


@attention_backward.register_fake
def _fake_backward(
    dy: Tensor,
    dlse: Tensor,
    y: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    table: Tensor | None = None,
    **scalars: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.scalars = dict(keyword_only_inputs)


def _backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    y, lse, *inputs = ctx.saved_tensors
    dq, dk, dv = attention_backward(dy, dlse, y, lse, *inputs, **ctx.scalars)
    return dq, dk, dv, None, None, None


attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("attention")


@register_flop_formula(torch.ops.reattend.attention)
def attention_flops(
    q: Shape,
    k: Shape,
    v: Shape,
    start: Shape,
    length: Shape,
    table: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """2 H N M (d + e) per row, over the whole capacity: like torch's own, masks do not count."""
    b, h, n, d = q
    m = k[2] if table is None else table[1] * k[2]
    return 2 * b * h * n * m * (d + v[3])


@register_flop_formula(torch.ops.reattend.attention_backward)
def attention_backward_flops(
    dy: Shape,
    dlse: Shape,
    y: Shape,
    lse: Shape,
    q: Shape,
    k: Shape,
    v: Shape,
    start: Shape,
    length: Shape,
    table: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Recomputed scores, dp, dv, dq, dk: 2 H N M (3 d + 2 e) per row."""
    b, h, n, d = q
    m = k[2] if table is None else table[1] * k[2]
    return 2 * b * h * n * m * (3 * d + 2 * v[3])
