"""Torch reference of `reattend::routed_attention`.

`routed_attention` is plain, traceable and differentiable by autograd, and computes every head: use
it to read what the op means. `forward` and `backward` compute, for every row of the batch and unit,
the queries that use the unit and no others; this is the op on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.attention import reference as dense
from reattend.kernels.blocked import attend_blocked, attend_blocked_backward
from reattend.kernels.configs import DECODE_QUERIES
from reattend.kernels.core import Cache, Rule, compute_dtype
from reattend.kernels.masking import query_positions
from reattend.kernels.routed_attention.fused import attend_fused, fits


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
    """Grouped-query attention in which each query uses some of the units only.

    Args:
        q_BHNd: queries; see `reattend.kernels.attention.reference.attention` for this and for all
            that is not listed here.
        k_BGMd: keys of every token: a later query may use any unit.
        v_BGMe: values.
        active_BUN: bool, which queries use which unit. There are H units, a query head each, or G,
            a KV group with all heads that read it each.
        kv_start_B: first valid key of each row.
        kv_len_B: one past the last valid key of each row, the new ones included.
        scale: factor on q . k.
        causal: hide keys after the query.
        sliding_window: number of latest keys seen; 0 is all.
        softcap: cap on the scores; 0 is off.

    Returns:
        ``y_BHNe`` and ``lse_BHN``; a head that a query does not use gives y = 0 and lse = -inf.
    """
    y, lse = dense.attention(
        q_BHNd, k_BGMd, v_BGMe, kv_start_B, kv_len_B,
        scale=scale, causal=causal, sliding_window=sliding_window, softcap=softcap,
    )  # fmt: skip
    active_BHN = active_BUN.repeat_interleave(q_BHNd.shape[1] // active_BUN.shape[1], 1)
    y = torch.where(active_BHN[..., None], y, 0)
    return y, torch.where(active_BHN, lse, float("-inf"))


class Inputs(NamedTuple):
    """The tensors of a call."""

    q_BHNd: Tensor
    k_BGMd: Tensor
    v_BGMe: Tensor
    active_BUN: Tensor
    kv_start_B: Tensor
    kv_len_B: Tensor


class _Unit(NamedTuple):
    """One unit of one row: which heads and queries, at which positions, over which keys."""

    row: int
    heads: slice
    group: slice
    at_n: Tensor
    pos_1n: Tensor
    cache: Cache

    def of(self, x_BHN: Tensor) -> Tensor:
        """These numbers of [B, H, N, ..] as [1, 1, heads, n, ..]."""
        picked: Tensor = x_BHN[self.row, self.heads].index_select(1, self.at_n)[None, None]
        return picked


def _cache(x: Inputs, rows: slice, groups: slice) -> Cache:
    """Some rows' keys and values of some KV groups: views."""
    keys, values = x.k_BGMd[rows, groups], x.v_BGMe[rows, groups]
    return Cache((keys,), values, x.kv_start_B[rows], x.kv_len_B[rows])


def _units(x: Inputs) -> Iterator[_Unit]:
    """Every (row, unit) that some query uses."""
    b, h, n, _ = x.q_BHNd.shape
    units, groups = x.active_BUN.shape[1], x.k_BGMd.shape[1]
    each, per_group = h // units, h // groups
    pos_BN = query_positions(x.kv_len_B, n)
    for row in range(b):
        rows = slice(row, row + 1)
        for unit in x.active_BUN[row].any(-1).nonzero()[:, 0].tolist():
            at_n = x.active_BUN[row, unit].nonzero()[:, 0]
            group = slice(unit * each // per_group, unit * each // per_group + 1)
            cache = _cache(x, rows, group)
            heads = slice(unit * each, (unit + 1) * each)
            yield _Unit(row, heads, group, at_n, pos_BN[rows, at_n], cache)


def forward(x: Inputs, rule: Rule) -> tuple[Tensor, Tensor]:
    """`routed_attention`, reading and computing for active queries only."""
    b, h, n, _ = x.q_BHNd.shape
    y = x.q_BHNd.new_zeros(b, h, n, x.v_BGMe.shape[3])
    lse = x.q_BHNd.new_full((b, h, n), float("-inf"), dtype=compute_dtype(x.q_BHNd.dtype))
    if n <= DECODE_QUERIES:
        return _few(x, rule, y, lse)
    for unit in _units(x):
        q = unit.of(x.q_BHNd)
        if fits(q, unit.cache, unit.pos_1n, rule):
            y_11hne, lse_11hn = attend_fused(q, unit.cache, unit.pos_1n, rule)
        else:
            y_11hne, lse_11hn = attend_blocked((q,), unit.cache, rule, unit.pos_1n)
        y[unit.row, unit.heads].index_copy_(1, unit.at_n, y_11hne[0, 0])
        lse[unit.row, unit.heads].index_copy_(1, unit.at_n, lse_11hn[0, 0].to(lse.dtype))
    return y, lse


def _few(x: Inputs, rule: Rule, y: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Of few queries: a KV group's keys are read once, for the heads that any query uses.

    Args:
        x: the call.
        rule: the scalar arguments.
        y: zeros, filled here; `lse` likewise, -inf.
    """
    h, each = x.q_BHNd.shape[1], x.q_BHNd.shape[1] // x.k_BGMd.shape[1]
    active_BHN = x.active_BUN.repeat_interleave(h // x.active_BUN.shape[1], 1)
    for row in range(len(y)):
        used_H = active_BHN[row].any(-1)
        for g in used_H.unflatten(0, (-1, each)).any(-1).nonzero()[:, 0].tolist():
            heads = used_H[g * each : (g + 1) * each].nonzero()[:, 0] + g * each
            cache = _cache(x, slice(row, row + 1), slice(g, g + 1))
            y_11hne, lse_11hn = attend_blocked((x.q_BHNd[row, heads][None, None],), cache, rule)
            used = active_BHN[row, heads]
            y[row, heads] = torch.where(used[..., None], y_11hne[0, 0], 0)
            lse[row, heads] = torch.where(used, lse_11hn[0, 0], float("-inf"))
    return y, lse


def backward(
    grads: tuple[Tensor, Tensor], outputs: tuple[Tensor, Tensor], x: Inputs, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradient of q, k and v (in their shapes and dtypes).

    Args:
        grads: of y_BHNe and lse_BHN.
        outputs: y_BHNe and lse_BHN.
        x: as given to the op.
        rule: the scalar arguments.
    """
    dtype = compute_dtype(x.q_BHNd.dtype)
    dq, dk, dv = (
        torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (x.q_BHNd, x.k_BGMd, x.v_BGMe)
    )
    for unit in _units(x):
        (dq_u,), (dk_u,), dv_u = attend_blocked_backward(
            (unit.of(grads[0]), unit.of(grads[1])),
            (unit.of(outputs[0]), unit.of(outputs[1])),
            (unit.of(x.q_BHNd),),
            unit.cache,
            rule,
            unit.pos_1n,
        )
        dq[unit.row, unit.heads].index_copy_(1, unit.at_n, dq_u[0, 0])
        dk[unit.row, unit.group] += dk_u[0]
        dv[unit.row, unit.group] += dv_u[0]
    return dq.to(x.q_BHNd.dtype), dk.to(x.k_BGMd.dtype), dv.to(x.v_BGMe.dtype)
