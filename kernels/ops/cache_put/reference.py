"""Torch form of the cache write, functional and in place.

The two exist because they serve different masters: eager decoding must not copy the cache, so it
writes in place; an exported graph must be functional, and its runtime (ONNX TensorScatter with
past and present bound to one buffer) makes it in place again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.checks import same_size

NAME = "reattend::cache_put"


def check(cache: Tensor, new: Tensor, start_B: Tensor, axis: int) -> int:
    """Check shapes and dtypes; return ``axis`` counted from the front."""
    rank = cache.dim()
    if not -rank <= axis < rank or axis % rank == 0:
        raise ArgumentError(
            f"{NAME}: axis must name a dimension of the cache other than the batch",
            why=f"axis {axis}, {rank} dimensions",
        )
    axis %= rank
    if new.dim() != rank:
        raise ArgumentError(
            f"{NAME}: cache and new must have as many dimensions", why=f"{rank} and {new.dim()}"
        )
    if new.dtype != cache.dtype:
        raise ArgumentError(
            f"{NAME}: cache and new must have one dtype", why=f"{cache.dtype} and {new.dtype}"
        )
    for i in range(rank):
        if i != axis:
            same_size(NAME, cache.shape[i], new.shape[i], f"dimension {i} of cache and new")
    if start_B.dim() != 1 or start_B.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{NAME}: start_B must be a 1-D int32 or int64 tensor",
            why=f"it has {start_B.dim()} dimensions and dtype {start_B.dtype}",
        )
    same_size(NAME, start_B.shape[0], cache.shape[0], "the batch of the cache and start_B")
    return axis


def check_room(cache: Tensor, new: Tensor, start_B: Tensor, axis: int) -> None:
    """Raise ArgumentError when some row would be written outside the capacity (reads start_B)."""
    if start_B.numel() == 0:
        return
    first, last = int(start_B.min()), int(start_B.max()) + new.shape[axis]
    if first < 0 or last > cache.shape[axis]:
        raise ArgumentError(
            f"{NAME}: the new rows do not fit into the cache",
            why=f"rows {first} to {last} of a capacity of {cache.shape[axis]}",
            next_step="make the cache larger (max_cache_len) or generate fewer tokens",
        )


def write_index(new: Tensor, start_B: Tensor, axis: int) -> Tensor:
    """Index of each element of ``new`` along ``axis`` of the cache, expanded to its shape."""
    shape = [1] * new.dim()
    shape[axis] = new.shape[axis]
    offset = torch.arange(new.shape[axis], device=new.device).view(shape)
    return (start_B.long().view(-1, *[1] * (new.dim() - 1)) + offset).expand(new.shape)


def cache_put_(cache: Tensor, new: Tensor, start_B: Tensor, axis: int) -> Tensor:
    """Write ``new[b]`` at row ``start_B[b]`` of ``cache[b]`` along ``axis``, in place.

    Args:
        cache: (B, ..., capacity, ...), changed in place.
        new: like the cache with N rows along ``axis``, same dtype.
        start_B: first row to write, int32 or int64.
        axis: dimension of the rows, not the batch; may be negative.

    Returns:
        ``cache``.

    Raises:
        ArgumentError: shapes or dtypes do not match, or (on CPU, where looking is free) the rows
            do not fit.
    """
    axis = check(cache, new, start_B, axis)
    if cache.device.type != "cpu" or torch.compiler.is_compiling():
        return cache.scatter_(axis, write_index(new, start_B, axis), new)
    check_room(cache, new, start_B, axis)
    rows, n = start_B.tolist(), new.shape[axis]
    if len(set(rows)) == 1:
        cache.narrow(axis, rows[0], n).copy_(new)
    else:
        for b, row in enumerate(rows):
            cache[b].narrow(axis - 1, row, n).copy_(new[b])
    return cache
