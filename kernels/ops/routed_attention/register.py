"""Registration of `reattend::routed_attention` and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reattend.errors import ArgumentError
from reattend.kernels.autocast import register_autocast
from reattend.kernels.checks import check_cache, check_rows, check_scalars, same_size
from reattend.kernels.core import Rule, compute_dtype
from reattend.kernels.lazy_triton import load_launch
from reattend.kernels.routed_attention import reference
from reattend.kernels.routed_attention.reference import Inputs

NAME = "reattend::routed_attention"
_ARGUMENTS = (
    "Tensor q_BHNd, Tensor k_BGMd, Tensor v_BGMe, Tensor active_BUN, Tensor kv_start_B,"
    " Tensor kv_len_B, *, float scale, bool causal=True, int sliding_window=0, float softcap=0.0"
)


def check(x: Inputs, rule: Rule) -> None:
    """Raise ArgumentError where shapes or dtypes break the contract of the op."""
    check_cache(NAME, x.q_BHNd, x.k_BGMd, x.v_BGMe)
    same_size(NAME, x.q_BHNd.shape[0], x.k_BGMd.shape[0], "the batches of q and k")
    check_rows(NAME, x.q_BHNd, x.kv_start_B, x.kv_len_B)
    check_scalars(NAME, rule.sliding_window, rule.softcap)
    active, heads, groups = x.active_BUN, x.q_BHNd.shape[1], x.k_BGMd.shape[1]
    if active.dim() != 3 or active.dtype != torch.bool or active.device != x.q_BHNd.device:
        raise ArgumentError(
            f"{NAME}: active_BUN must be a 3-D bool tensor on the device of the queries",
            why=f"it has {active.dim()} dimensions, dtype {active.dtype}, on {active.device}",
        )
    same_size(NAME, active.shape[0], x.q_BHNd.shape[0], "the batches of q and active_BUN")
    same_size(NAME, active.shape[2], x.q_BHNd.shape[2], "the lengths of q and active_BUN")
    if active.shape[1] not in (heads, groups):
        raise ArgumentError(
            f"{NAME}: a unit of active_BUN is a query head or a KV group",
            why=f"{active.shape[1]} units, {heads} query heads, {groups} KV groups",
        )


@torch.library.custom_op(NAME, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def routed_attention(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    active_BUN: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `reattend.kernels.routed_attention.reference` for the meaning of every argument."""
    x = Inputs(q_BHNd, k_BGMd, v_BGMe, active_BUN, kv_start_B, kv_len_B)
    rule = Rule(scale, causal, sliding_window, softcap)
    check(x, rule)
    return reference.forward(x, rule)


@routed_attention.register_kernel("cuda")
def _cuda(
    *inputs: Tensor,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    x, rule = Inputs(*inputs), Rule(scale, causal, sliding_window, softcap)
    check(x, rule)
    launch = load_launch("reattend.kernels.routed_attention.launch")
    config = launch.config_for(x) if scale > 0 else None
    if config is None:  # fp64, very wide heads, a GPU no kernel is shipped for, a scale of 0
        return reference.forward(x, rule)
    done: tuple[Tensor, Tensor] = launch.launch(x, rule, config)
    return done


@routed_attention.register_fake
def _fake(
    *inputs: Tensor,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    x = Inputs(*inputs)
    check(x, Rule(scale, causal, sliding_window, softcap))
    b, h, n, _ = x.q_BHNd.shape
    y = x.q_BHNd.new_empty(b, h, n, x.v_BGMe.shape[3])
    return y, x.q_BHNd.new_empty(b, h, n, dtype=compute_dtype(x.q_BHNd.dtype))


@torch.library.custom_op(
    "reattend::routed_attention_backward",
    mutates_args=(),
    schema="(Tensor dy_BHNe, Tensor dlse_BHN, Tensor y_BHNe, Tensor lse_BHN,"
    f" {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def routed_attention_backward(
    dy_BHNe: Tensor,
    dlse_BHN: Tensor,
    y_BHNe: Tensor,
    lse_BHN: Tensor,
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    active_BUN: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from those of y and lse."""
    x = Inputs(q_BHNd, k_BGMd, v_BGMe, active_BUN, kv_start_B, kv_len_B)
    rule = Rule(scale, causal, sliding_window, softcap)
    return reference.backward((dy_BHNe, dlse_BHN), (y_BHNe, lse_BHN), x, rule)


@routed_attention_backward.register_kernel("cuda")
def _cuda_backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, *inputs: Tensor,
    scale: float, causal: bool = True, sliding_window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernels of attention's gradient, over the queries that use a head."""
    x, rule = Inputs(*inputs), Rule(scale, causal, sliding_window, softcap)
    launch = load_launch("reattend.kernels.routed_attention.launch")
    configs = launch.configs_for(x)
    if configs is None:  # fp64, very wide heads, a GPU no kernel is shipped for
        return reference.backward((dy, dlse), (y, lse), x, rule)
    done: tuple[Tensor, Tensor, Tensor] = launch.launch_backward(
        (dy, dlse), (y, lse), x, rule, configs
    )
    return done


@routed_attention_backward.register_fake
def _fake_backward(
    dy: Tensor, dlse: Tensor, y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    active: Tensor, start: Tensor, length: Tensor, **scalars: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.scalars = dict(keyword_only_inputs)


def _backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    y, lse, *inputs = ctx.saved_tensors
    dq, dk, dv = routed_attention_backward(dy, dlse, y, lse, *inputs, **ctx.scalars)
    return dq, dk, dv, None, None, None


routed_attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("routed_attention")


def pairs(x: Inputs) -> int:
    """(query, head, key) triples, keys counted over the whole capacity, as torch's formulas do.

    Where values are not at hand (a traced call), as if every query used every head.
    """
    b, h, n, _ = x.q_BHNd.shape
    used = b * x.active_BUN.shape[1] * n
    if not isinstance(x.active_BUN, torch._subclasses.FakeTensor) and not x.active_BUN.is_meta:
        used = int(x.active_BUN.sum())
    return used * (h // x.active_BUN.shape[1]) * int(x.k_BGMd.shape[2])


@register_flop_formula(torch.ops.reattend.routed_attention, get_raw=True)
def routed_attention_flops(*inputs: Any, **rest: Any) -> int:
    """2 (d + e) for every key of every head that a query uses."""
    x = Inputs(*inputs[:6])
    return 2 * pairs(x) * (x.q_BHNd.shape[3] + x.v_BGMe.shape[3])


@register_flop_formula(torch.ops.reattend.routed_attention_backward, get_raw=True)
def routed_attention_backward_flops(*inputs: Any, **rest: Any) -> int:
    """Recomputed scores, dp, dv, dq, dk: 2 (3 d + 2 e) for each."""
    x = Inputs(*inputs[4:10])
    return 2 * pairs(x) * (3 * x.q_BHNd.shape[3] + 2 * x.v_BGMe.shape[3])
