"""Registration of `reattend::latent_attention` and `reattend::latent_attention_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reattend.errors import ArgumentError
from reattend.kernels.autocast import register_autocast
from reattend.kernels.checks import (
    Shape,
    check_float,
    check_rows,
    check_scalars,
    check_table,
    same_size,
)
from reattend.kernels.core import Rule, compute_dtype
from reattend.kernels.latent_attention import reference
from reattend.kernels.lazy_triton import load_launch

NAME = "reattend::latent_attention"
_SCALARS = "float scale, bool causal=True, int sliding_window=0, float softcap=0.0"
_INPUTS = (
    "Tensor q_nope_BHNr, Tensor q_rope_BHNR, Tensor latent_BMr, Tensor rope_BMR,"
    " Tensor kv_start_B, Tensor kv_len_B, Tensor? block_table_BP=None"
)


def check(
    q_nope_BHNr: Tensor,
    q_rope_BHNR: Tensor,
    latent_BMr: Tensor,
    rope_BMR: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None,
    *,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> None:
    """Raise ArgumentError where shapes or dtypes break the contract of the op."""
    if not (
        q_nope_BHNr.dim() == q_rope_BHNR.dim() == 4 and latent_BMr.dim() == rope_BMR.dim() == 3
    ):
        raise ArgumentError(
            f"{NAME}: the queries must have 4 dimensions, latent and rope 3",
            why=f"q_nope {q_nope_BHNr.dim()}, q_rope {q_rope_BHNR.dim()}, "
            f"latent {latent_BMr.dim()}, rope {rope_BMR.dim()}",
        )
    check_float(
        NAME,
        q_nope_BHNr=q_nope_BHNr,
        q_rope_BHNR=q_rope_BHNR,
        latent_BMr=latent_BMr,
        rope_BMR=rope_BMR,
    )
    for axis, what in enumerate(("batches", "heads", "lengths")):
        same_size(NAME, q_nope_BHNr.shape[axis], q_rope_BHNR.shape[axis], f"the query {what}")
    same_size(NAME, q_nope_BHNr.shape[3], latent_BMr.shape[2], "the widths of q_nope and latent")
    same_size(NAME, q_rope_BHNR.shape[3], rope_BMR.shape[2], "the widths of q_rope and rope")
    same_size(NAME, latent_BMr.shape[0], rope_BMR.shape[0], "the batches (pages) of the cache")
    same_size(NAME, latent_BMr.shape[1], rope_BMR.shape[1], "the lengths of latent and rope")
    if block_table_BP is None:
        same_size(NAME, q_nope_BHNr.shape[0], latent_BMr.shape[0], "the batches of q and cache")
    check_rows(NAME, q_nope_BHNr, kv_start_B, kv_len_B)
    check_table(NAME, q_nope_BHNr.shape[0], block_table_BP)
    check_scalars(NAME, sliding_window, softcap)


@torch.library.custom_op(
    NAME, mutates_args=(), schema=f"({_INPUTS}, *, {_SCALARS}) -> (Tensor, Tensor)"
)
def latent_attention(
    q_nope_BHNr: Tensor,
    q_rope_BHNR: Tensor,
    latent_BMr: Tensor,
    rope_BMR: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `reattend.kernels.latent_attention.reference.latent_attention`."""
    inputs = (q_nope_BHNr, q_rope_BHNR, latent_BMr, rope_BMR, kv_start_B, kv_len_B, block_table_BP)
    check(*inputs, sliding_window=sliding_window, softcap=softcap)
    return reference.forward(*inputs, Rule(scale, causal, sliding_window, softcap))


@latent_attention.register_kernel("cuda")
def _cuda(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    start: Tensor,
    length: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    inputs = (q_nope, q_rope, latent, rope, start, length, table)
    check(*inputs, sliding_window=sliding_window, softcap=softcap)
    rule = Rule(scale, causal, sliding_window, softcap)
    launch = load_launch("reattend.kernels.latent_attention.launch")
    config = launch.config_for(q_nope, q_rope) if scale > 0 else None
    if config is None:  # fp64, very wide rows, or a GPU no kernel is shipped for
        return reference.forward(*inputs, rule)
    done: tuple[Tensor, Tensor] = launch.launch(*inputs, rule, config)
    return done


@latent_attention.register_fake
def _fake(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    start: Tensor,
    length: Tensor,
    table: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    inputs = (q_nope, q_rope, latent, rope, start, length, table)
    check(*inputs, sliding_window=sliding_window, softcap=softcap)
    b, h, n, r = q_nope.shape
    return q_nope.new_empty(b, h, n, r), q_nope.new_empty(
        b, h, n, dtype=compute_dtype(q_nope.dtype)
    )


@torch.library.custom_op(
    "reattend::latent_attention_backward",
    mutates_args=(),
    schema="(Tensor du_BHNr, Tensor dlse_BHN, Tensor u_BHNr, Tensor lse_BHN,"
    f" {_INPUTS}, *, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def latent_attention_backward(
    du_BHNr: Tensor,
    dlse_BHN: Tensor,
    u_BHNr: Tensor,
    lse_BHN: Tensor,
    q_nope_BHNr: Tensor,
    q_rope_BHNR: Tensor,
    latent_BMr: Tensor,
    rope_BMR: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q_nope, q_rope, latent, rope from those of u and lse."""
    return reference.backward(
        (du_BHNr, dlse_BHN),
        (u_BHNr, lse_BHN),
        (q_nope_BHNr, q_rope_BHNR, latent_BMr, rope_BMR, kv_start_B, kv_len_B, block_table_BP),
        Rule(scale, causal, sliding_window, softcap),
    )


@latent_attention_backward.register_kernel("cuda")
def _cuda_backward(
    du: Tensor, dlse: Tensor, u: Tensor, lse: Tensor, q_nope: Tensor, q_rope: Tensor,
    latent: Tensor, rope: Tensor, start: Tensor, length: Tensor, table: Tensor | None = None, *,
    scale: float, causal: bool = True, sliding_window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(scale, causal, sliding_window, softcap)
    launch = load_launch("reattend.kernels.latent_attention.launch_backward")
    known = table is None and scale >= launch.MIN_SCALE
    configs = launch.configs_for(q_nope, rope) if known else None
    if configs is None:  # pages, fp64, very wide rows, a GPU without kernels, a scale of 0
        given = (q_nope, q_rope, latent, rope, start, length, table)
        return reference.backward((du, dlse), (u, lse), given, rule)
    inputs = (q_nope, q_rope, latent, rope, start, length)
    done: tuple[Tensor, Tensor, Tensor, Tensor] = launch.launch_backward(
        (du, dlse), (u, lse), inputs, rule, configs
    )
    return done


@latent_attention_backward.register_fake
def _fake_backward(
    du: Tensor,
    dlse: Tensor,
    u: Tensor,
    lse: Tensor,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    rope: Tensor,
    *rest: Any,
    **scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q_nope.new_empty(q_nope.shape),
        q_rope.new_empty(q_rope.shape),
        latent.new_empty(latent.shape),
        rope.new_empty(rope.shape),
    )


def _setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output, *inputs)
    ctx.scalars = dict(keyword_only_inputs)


def _backward(ctx: Any, du: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    grads = latent_attention_backward(du, dlse, *ctx.saved_tensors, **ctx.scalars)
    return *grads, None, None, None


latent_attention.register_autograd(_backward, setup_context=_setup_context)
register_autocast("latent_attention")


@register_flop_formula(torch.ops.reattend.latent_attention)
def latent_attention_flops(
    q_nope: Shape,
    q_rope: Shape,
    latent: Shape,
    rope: Shape,
    start: Shape,
    length: Shape,
    table: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """2 H N M (2 r + R) per row, over the whole capacity: like torch's own, masks do not count."""
    b, h, n, r = q_nope
    m = latent[1] if table is None else table[1] * latent[1]
    return 2 * b * h * n * m * (2 * r + q_rope[3])


@register_flop_formula(torch.ops.reattend.latent_attention_backward)
def latent_attention_backward_flops(
    du: Shape,
    dlse: Shape,
    u: Shape,
    lse: Shape,
    q_nope: Shape,
    q_rope: Shape,
    latent: Shape,
    rope: Shape,
    start: Shape,
    length: Shape,
    table: Shape | None = None,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Recomputed scores, dp, du-to-latent, dq, dk: 2 H N M (5 r + 3 R) per row."""
    b, h, n, r = q_nope
    m = latent[1] if table is None else table[1] * latent[1]
    return 2 * b * h * n * m * (5 * r + 3 * q_rope[3])
