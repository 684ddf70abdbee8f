"""Argument checks of the ops, run on real and on symbolic shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.errors import ArgumentError

#: sizes of a tensor, as torch's FLOP counter gives them to a formula
Shape = tuple[int, ...]


def same_size(op: str, a: Any, b: Any, what: str) -> None:
    """Require two sizes to be equal; symbolic sizes become a runtime assertion of the graph."""
    if isinstance(a, int) and isinstance(b, int):
        if a != b:
            raise ArgumentError(f"{op}: {what} differ", why=f"{a} and {b}")
        return
    torch._check(a == b, lambda: f"{op}: {what} differ: {a} and {b}")


def check_rows(op: str, q: Tensor, kv_start_B: Tensor, kv_len_B: Tensor) -> None:
    """kv_start and kv_len are 1-D integer tensors beside q, one entry per row of the batch."""
    for name, x in (("kv_start_B", kv_start_B), ("kv_len_B", kv_len_B)):
        if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"{op}: {name} must be a 1-D int32 or int64 tensor",
                why=f"it has {x.dim()} dimensions and dtype {x.dtype}",
            )
        if x.device != q.device:
            raise ArgumentError(
                f"{op}: {name} must be on the device of the queries",
                why=f"{x.device} and {q.device}",
            )
        same_size(op, x.shape[0], q.shape[0], f"the batch of the queries and the length of {name}")


def check_table(op: str, batch: Any, block_table_BP: Tensor | None) -> None:
    """A block table is (B, P), integer."""
    if block_table_BP is None:
        return
    if block_table_BP.dim() != 2 or block_table_BP.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{op}: block_table_BP must be a 2-D int32 or int64 tensor",
            why=f"it has {block_table_BP.dim()} dimensions and dtype {block_table_BP.dtype}",
        )
    same_size(op, block_table_BP.shape[0], batch, "the batch of the queries and the block table")


def check_scalars(op: str, sliding_window: int, softcap: float) -> None:
    """Window and softcap are 0 (off) or positive."""
    if sliding_window < 0 or softcap < 0:
        raise ArgumentError(
            f"{op}: sliding_window and softcap must be 0 (off) or positive",
            why=f"sliding_window={sliding_window}, softcap={softcap}",
        )


def check_float(op: str, **tensors: Tensor) -> None:
    """All float operands share one dtype and have the expected number of dimensions."""
    names = list(tensors)
    first = tensors[names[0]]
    if not first.is_floating_point():
        raise ArgumentError(f"{op}: {names[0]} must be a float tensor", why=f"it is {first.dtype}")
    for name in names[1:]:
        if tensors[name].dtype != first.dtype:
            raise ArgumentError(
                f"{op}: {names[0]} and {name} must have one dtype",
                why=f"{first.dtype} and {tensors[name].dtype}",
                next_step="cast the queries to the dtype of the cache, or use autocast",
            )


def check_cache(op: str, q_BHNd: Tensor, k_BGMd: Tensor, v_BGMe: Tensor) -> None:
    """Queries, keys and values have 4 dimensions, one dtype and sizes that fit."""
    if not q_BHNd.dim() == k_BGMd.dim() == v_BGMe.dim() == 4:
        raise ArgumentError(
            f"{op}: q, k and v must have 4 dimensions",
            why=f"they have {q_BHNd.dim()}, {k_BGMd.dim()} and {v_BGMe.dim()}",
        )
    check_float(op, q_BHNd=q_BHNd, k_BGMd=k_BGMd, v_BGMe=v_BGMe)
    same_size(op, q_BHNd.shape[3], k_BGMd.shape[3], "the widths of q and k")
    same_size(op, k_BGMd.shape[1], v_BGMe.shape[1], "the heads of k and v")
    same_size(op, k_BGMd.shape[2], v_BGMe.shape[2], "the lengths of k and v")
    same_size(op, k_BGMd.shape[0], v_BGMe.shape[0], "the batches (pages) of k and v")
    if q_BHNd.shape[1] % k_BGMd.shape[1]:
        raise ArgumentError(
            f"{op}: the query heads must be a multiple of the KV heads",
            why=f"{q_BHNd.shape[1]} query heads, {k_BGMd.shape[1]} KV heads",
        )
