"""Torch reference of `reattend::sparse_attention`: over the dense mask of the layout.

Plain, traceable and differentiable by autograd: what the op means. `sparse_attention/blocked.py`
is what computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.core import Rule, average, compute_dtype, products, zero_unused
from reattend.kernels.masking import query_positions
from reattend.kernels.sparse_attention.mask import visible_pairs


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
    """Attention of N new queries over a cache that already holds their keys, where a layout says.

    The layout speaks of logical positions: logical key j of row b is storage row
    ``kv_start_b + j``, and query i is at logical position ``kv_len_b - kv_start_b - N + i``.
    Query i sees key j iff the layout of its head says so and ``kv_start_b + j < kv_len_b``.
    Storage rows that no query may see are never read into the result, whatever they hold.

    Args:
        q_BHNd: queries; H is a multiple of G.
        k_BGMd: keys, M rows of capacity.
        v_BGMe: values; e may differ from d.
        row_ptr: as in `BlockLayout`, like the next four.
        col: key block of each entry.
        tile: tile of each entry, or -1.
        tiles: bits of the tiles.
        head_layout: layout of each query head.
        kv_start_B: first valid key of each row (left padding), int32 or int64.
        kv_len_B: one past the last valid key of each row, the new ones included.
        block: tokens per block.
        first: the query block of the layout's row 0.
        scale: factor on q . k.
        softcap: cap * tanh(score / cap) before masking; 0 is off.

    Returns:
        ``y_BHNe`` in the dtype of q and ``lse_BHN``, the natural log-sum-exp in fp32 (fp64 for
        fp64 inputs). A query that sees nothing gives y = 0 and lse = -inf: one at a negative
        logical position (left padding), one whose row of the layout is empty, one whose block is
        not among the layout's rows.
    """
    n, m, groups = q_BHNd.shape[2], k_BGMd.shape[2], k_BGMd.shape[1]
    dtype = compute_dtype(q_BHNd.dtype)
    k, v = (zero_unused(x.to(dtype), kv_start_B, kv_len_B, 0) for x in (k_BGMd, v_BGMe))
    key_BM = torch.arange(m, device=k.device)[None] - kv_start_B[:, None]
    length_B = kv_len_B - kv_start_B
    pos_BN = query_positions(length_B, n)
    seen_BLNM = visible_pairs(row_ptr, col, tile, tiles, block, first, pos_BN, key_BM)
    seen_BLNM = seen_BLNM & (key_BM < length_B[:, None])[:, None, None]
    rule = Rule(scale, False, 0, softcap)
    s = products((q_BHNd.to(dtype).unflatten(1, (groups, -1)),), (k,), rule)
    hidden = ~seen_BLNM[:, head_layout.long()].unflatten(1, (groups, -1))
    y, lse = average(s.masked_fill(hidden, float("-inf")), v)
    return y.flatten(1, 2).to(q_BHNd.dtype), lse.flatten(1, 2)
