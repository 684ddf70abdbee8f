"""Which key each query sees, and how a paged cache is read and written back."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    pos_BN: Tensor,
    key_M: Tensor,
    *,
    causal: bool,
    sliding_window: int,
) -> Tensor:
    """The mask of the contract, from absolute indices.

    Key j is visible to the query at index p iff ``kv_start <= j < kv_len``, and ``j <= p`` when
    causal, and ``p - j < sliding_window`` when there is a window.

    Args:
        kv_start_B: first valid key of each row (left padding), int32 or int64.
        kv_len_B: one past the last valid key of each row.
        pos_BN: absolute index of each query.
        key_M: absolute index of each key.
        causal: hide keys after the query.
        sliding_window: number of most recent keys seen, itself included; 0 means all.

    Returns:
        Bool tensor (B, N, M), True where the key is visible.
    """
    key_11M = key_M[None, None, :]
    mask_BNM = (key_11M >= kv_start_B[:, None, None]) & (key_11M < kv_len_B[:, None, None])
    if causal:
        mask_BNM = mask_BNM & (key_11M <= pos_BN[:, :, None])
    else:
        mask_BNM = mask_BNM.expand(-1, pos_BN.shape[1], -1)
    if sliding_window:
        mask_BNM = mask_BNM & (pos_BN[:, :, None] - key_11M < sliding_window)
    return mask_BNM


def query_positions(kv_len_B: Tensor, n: int) -> Tensor:
    """Absolute index of each query (B, N): the queries are the last N keys of their row."""
    return kv_len_B[:, None] - n + torch.arange(n, device=kv_len_B.device)[None, :]


def gather_pages(pages: Tensor, block_table_BP: Tensor) -> Tensor:
    """Read a paged cache as one dense cache.

    Args:
        pages: (pages, page, w) or (pages, G, page, w).
        block_table_BP: page number of each stretch of ``page`` keys. Entries past ``kv_len`` may
            hold anything: they are clamped here and masked later.

    Returns:
        (B, P * page, w) or (B, G, P * page, w).
    """
    table_BP = block_table_BP.long().clamp(0, pages.shape[0] - 1)
    dense = pages[table_BP]
    if pages.dim() == 3:
        return dense.flatten(1, 2)
    return dense.transpose(1, 2).flatten(2, 3)


def scatter_pages(dense: Tensor, pages: Tensor, block_table_BP: Tensor) -> Tensor:
    """Transpose of `gather_pages`: add a dense gradient back onto the pages it was read from.

    Args:
        dense: gradient in the dense layout that `gather_pages` returns.
        pages: the paged cache, for its shape and device.
        block_table_BP: as given to `gather_pages`.

    Returns:
        Tensor shaped like ``pages``, in the dtype of ``dense``.
    """
    p = block_table_BP.shape[1]
    if pages.dim() == 4:
        dense = dense.unflatten(2, (p, pages.shape[2])).transpose(1, 2)
    else:
        dense = dense.unflatten(1, (p, pages.shape[1]))
    table = block_table_BP.long().clamp(0, pages.shape[0] - 1).flatten()
    out = torch.zeros(pages.shape, dtype=dense.dtype, device=dense.device)
    return out.index_add_(0, table, dense.flatten(0, 1))
