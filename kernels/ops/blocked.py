"""The same arithmetic in blocks of queries, reading only the keys a block can see.

This is the CPU implementation of the ops (and the fallback of other devices). It looks at the
*values* of kv_start and kv_len, so it lives inside the opaque op and is never traced.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reattend.kernels.core import Cache, Rule, attend, attend_backward, compute_dtype, zero_unused
from reattend.kernels.masking import query_positions

SCORES_PER_BLOCK = 1 << 24  # 64 MiB of fp32 scores


def _key_range(cache: Cache, pos: tuple[int, int], rule: Rule) -> tuple[int, int]:
    """Keys [lo, hi) that some query with a position in [pos[0], pos[1]] may see in some row."""
    lo, hi = int(cache.start.min()), int(cache.length.max())
    if rule.causal:
        hi = min(hi, pos[1] + 1)
    if rule.sliding_window:
        lo = max(lo, pos[0] - rule.sliding_window + 1)
    lo = min(max(lo, 0), cache.values.shape[2])
    return lo, min(max(hi, lo), cache.values.shape[2])


def _slice(cache: Cache, lo: int, hi: int, dtype: torch.dtype) -> Cache:
    """Rows [lo, hi) of the cache in the compute dtype, unused rows zeroed if there are any."""
    start_B, len_B = cache.start, cache.length
    all_used = int(start_B.max()) <= lo and int(len_B.min()) >= hi

    def take(x: Tensor) -> Tensor:
        x = x[:, :, lo:hi].to(dtype)
        return x if all_used else zero_unused(x, start_B, len_B, lo)

    keys = tuple(take(k) for k in cache.keys)
    # latent attention averages the rows it scores: clean them once
    shared = cache.values is cache.keys[0]
    values = keys[0] if shared else take(cache.values)
    return Cache(keys, values, start_B, len_B, lo)


def _blocks(
    queries: tuple[Tensor, ...], cache: Cache, rule: Rule, pos_BN: Tensor | None
) -> Iterator[tuple[int, int, Tensor, tuple[Tensor, ...], Cache]]:
    """Yield (first query, last query + 1, positions, queries, keys they can see)."""
    b, g, h, n, _ = queries[0].shape
    if n == 0 or b == 0:
        return
    dtype = compute_dtype(queries[0].dtype)
    pos_BN = query_positions(cache.length, n) if pos_BN is None else pos_BN
    keys_per_row = max(cache.values.shape[2], 1)
    step = min(max(SCORES_PER_BLOCK // (b * g * h * keys_per_row), 16), 64)
    for i in range(0, n, step):
        j = min(i + step, n)
        pos = pos_BN[:, i:j]
        lo, hi = _key_range(cache, (int(pos.min()), int(pos.max())), rule)
        part = tuple(q[:, :, :, i:j].to(dtype) for q in queries)
        yield i, j, pos, part, _slice(cache, lo, hi, dtype)


def attend_blocked(
    queries: tuple[Tensor, ...], cache: Cache, rule: Rule, pos_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attend` over all queries of a row, block by block.

    Args:
        queries: tuple of (B, G, h, N, w) in any float dtype.
        cache: the whole cache in its own dtype.
        rule: scale, causality, window, softcap.
        pos_BN: absolute index of each query, ascending; None: they are the last keys of their row.

    Returns:
        ``y (B, G, h, N, e)`` in the dtype of the queries and ``lse (B, G, h, N)`` in the compute
        dtype, both contiguous.
    """
    b, g, h, n, _ = queries[0].shape
    q = queries[0]
    y = q.new_zeros(b, g, h, n, cache.values.shape[-1])
    lse = q.new_full((b, g, h, n), float("-inf"), dtype=compute_dtype(q.dtype))
    for i, j, pos, part, keys in _blocks(queries, cache, rule, pos_BN):
        if keys.values.shape[2] == 0:
            continue
        y[:, :, :, i:j], lse[:, :, :, i:j] = attend(part, keys, pos, rule)
    return y, lse


def attend_blocked_backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    queries: tuple[Tensor, ...],
    cache: Cache,
    rule: Rule,
    pos_BN: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """`attend_backward` over all queries, block by block; results in the compute dtype."""
    dtype = compute_dtype(queries[0].dtype)

    def zeros(x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=dtype, device=x.device)

    dqueries = tuple(zeros(q) for q in queries)
    dkeys = tuple(zeros(k) for k in cache.keys)
    dvalues = zeros(cache.values)
    for i, j, pos, part, keys in _blocks(queries, cache, rule, pos_BN):
        lo, hi = keys.first, keys.first + keys.values.shape[2]
        if lo == hi:
            continue
        grads_ij = (grads[0][:, :, :, i:j].to(dtype), grads[1][:, :, :, i:j].to(dtype))
        outputs_ij = (outputs[0][:, :, :, i:j].to(dtype), outputs[1][:, :, :, i:j])
        dq, dk, dv = attend_backward(grads_ij, outputs_ij, part, keys, pos, rule)
        for whole, piece in zip(dqueries, dq, strict=True):
            whole[:, :, :, i:j] = piece
        for whole, piece in zip(dkeys, dk, strict=True):
            whole[:, :, lo:hi] += piece
        dvalues[:, :, lo:hi] += dv
    return dqueries, dkeys, dvalues
