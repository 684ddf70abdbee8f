"""Torch reference of `reattend::attention`.

`attention` is plain, traceable and differentiable by autograd: use it to train on CPU or to read
what the op means. `forward` and `backward` are the same thing in blocks, used inside the op.
"""

from __future__ import annotations

from torch import Tensor

from reattend.kernels.blocked import attend_blocked, attend_blocked_backward
from reattend.kernels.core import Cache, Rule, attend, compute_dtype, zero_unused
from reattend.kernels.masking import gather_pages, query_positions, scatter_pages


def _grouped(q_BHNd: Tensor, groups: int) -> Tensor:
    grouped: Tensor = q_BHNd.unflatten(1, (groups, q_BHNd.shape[1] // groups))
    return grouped


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
    """Attention of N new queries over a cache that already holds their keys.

    Query i of row b is at absolute index ``kv_len_b - N + i``; it sees key j iff
    ``kv_start_b <= j < kv_len_b``, and ``j <= index`` when causal, and
    ``index - j < sliding_window`` when there is a window. Rows of the cache that no query may
    see are never read into the result, whatever they hold.

    Args:
        q_BHNd: queries; H is a multiple of G.
        k_BGMd: keys, M rows of capacity; (pages, G, page, d) with a block table.
        v_BGMe: values; e may differ from d.
        kv_start_B: first valid key of each row (left padding), int32 or int64.
        kv_len_B: one past the last valid key of each row, the new ones included.
        block_table_BP: key j of row b is row ``j % page`` of page ``block_table[b, j // page]``.
        scale: factor on q . k.
        causal: hide keys after the query.
        sliding_window: number of latest keys seen, itself included; 0 is all.
        softcap: cap * tanh(score / cap) before masking; 0 is off.

    Returns:
        ``y_BHNe`` in the dtype of q and ``lse_BHN``, the natural log-sum-exp in fp32 (fp64 for
        fp64 inputs). A query that sees nothing gives y = 0 and lse = -inf.
    """
    if block_table_BP is not None:
        k_BGMd = gather_pages(k_BGMd, block_table_BP)
        v_BGMe = gather_pages(v_BGMe, block_table_BP)
    dtype = compute_dtype(q_BHNd.dtype)
    cache = Cache(
        (zero_unused(k_BGMd.to(dtype), kv_start_B, kv_len_B, 0),),
        zero_unused(v_BGMe.to(dtype), kv_start_B, kv_len_B, 0),
        kv_start_B,
        kv_len_B,
    )
    pos_BN = query_positions(kv_len_B, q_BHNd.shape[2])
    rule = Rule(scale, causal, sliding_window, softcap)
    y, lse = attend((_grouped(q_BHNd, k_BGMd.shape[1]).to(dtype),), cache, pos_BN, rule)
    return y.flatten(1, 2).to(q_BHNd.dtype), lse.flatten(1, 2)


def forward(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    block_table_BP: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    """`attention` in blocks of queries: bounded memory, reads only keys that are visible."""
    if block_table_BP is not None:
        k_BGMd = gather_pages(k_BGMd, block_table_BP)
        v_BGMe = gather_pages(v_BGMe, block_table_BP)
    q = _grouped(q_BHNd, k_BGMd.shape[1])
    y, lse = attend_blocked((q,), Cache((k_BGMd,), v_BGMe, kv_start_B, kv_len_B), rule)
    return y.flatten(1, 2), lse.flatten(1, 2)


def backward(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradient of q, k and v (in their shapes and dtypes).

    Args:
        grads: of y_BHNe and lse_BHN.
        outputs: y_BHNe and lse_BHN.
        inputs: q, k, v, kv_start, kv_len, block table, as given to the op.
        rule: the scalar arguments.
    """
    q_BHNd, k, v, kv_start_B, kv_len_B, table = inputs
    dense_k = k if table is None else gather_pages(k, table)
    dense_v = v if table is None else gather_pages(v, table)
    groups = dense_k.shape[1]
    (dq,), (dk,), dv = attend_blocked_backward(
        (_grouped(grads[0], groups), _grouped(grads[1], groups)),
        (_grouped(outputs[0], groups), _grouped(outputs[1], groups)),
        (_grouped(q_BHNd, groups),),
        Cache((dense_k,), dense_v, kv_start_B, kv_len_B),
        rule,
    )
    if table is not None:
        dk, dv = scatter_pages(dk, k, table), scatter_pages(dv, v, table)
    return dq.flatten(1, 2).to(q_BHNd.dtype), dk.to(k.dtype), dv.to(v.dtype)
