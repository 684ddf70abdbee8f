"""Registration of the functional `reattend::cache_put` (becomes ONNX TensorScatter)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reattend.kernels.autocast import register_autocast
from reattend.kernels.cache_put.reference import NAME, cache_put_, check, write_index


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    schema="(Tensor cache, Tensor new, Tensor start_B, int axis) -> Tensor",
)
def cache_put(cache: Tensor, new: Tensor, start_B: Tensor, axis: int) -> Tensor:
    """A copy of ``cache`` with ``new[b]`` written at row ``start_B[b]`` along ``axis``.

    Arguments and errors are those of `cache_put_`. Use that one in eager code: this op copies
    the cache and exists for graphs.
    """
    copy = cache.clone(memory_format=torch.contiguous_format)
    return cache_put_(copy, new, start_B, axis)


@cache_put.register_fake
def _fake(cache: Tensor, new: Tensor, start_B: Tensor, axis: int) -> Tensor:
    check(cache, new, start_B, axis)
    return cache.new_empty(cache.shape)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, new, start_B, axis = inputs
    ctx.save_for_backward(start_B)
    ctx.new_shape, ctx.axis = new.shape, axis % new.dim()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    (start_B,) = ctx.saved_tensors
    index = write_index(grad.new_empty(ctx.new_shape), start_B, ctx.axis)
    return grad.scatter(ctx.axis, index, 0.0), grad.gather(ctx.axis, index), None, None


def _to_cache_dtype(
    cache: Tensor, new: Tensor, start_B: Tensor, axis: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    return cache, new.to(cache.dtype), start_B, axis


cache_put.register_autograd(_backward, setup_context=_setup_context)
register_autocast("cache_put", _to_cache_dtype)


@register_flop_formula(torch.ops.reattend.cache_put)
def cache_put_flops(*args: Any, **kwargs: Any) -> int:
    """A copy does no arithmetic."""
    return 0
