"""The torch ops that become the nodes of models without states; they exist to be traced and to say
what those mean.

Layout letters: B batch, N queries, M keys, H query heads, G key/value heads, d and e widths, R
regions, c queries and K keys of a region, L rows of all regions, S what is seen of all regions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend


@torch.library.custom_op("reattend::masked_attention", mutates_args=())
def masked_attention(
    q_BHNd: Tensor, k_BGMd: Tensor, v_BGMe: Tensor, seen: Tensor, scale: float, softcap: float
) -> Tensor:
    """Attention to the keys that a mask shows.

    Args:
        q_BHNd, k_BGMd, v_BGMe: queries, keys and values.
        seen: bool, as [B, H, N, M]; any of the first three sizes may be 1.
        scale, softcap: of the scores.

    Returns:
        y [B, H, N, e]; of a query that sees nothing it is finite, and means nothing.
    """
    core = _core(q_BHNd, k_BGMd, v_BGMe, scale, softcap)
    return attend(q_BHNd, k_BGMd, v_BGMe, core, _never_empty(seen))


@masked_attention.register_fake
def _masked_fake(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("reattend::region_attention", mutates_args=())
def region_attention(
    q_BHNd: Tensor, k_BGMd: Tensor, v_BGMe: Tensor, query_rows_Rc: Tensor, key_rows_L: Tensor,
    seen_S: Tensor, spans_R3: Tensor, at_N: Tensor, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention of regions of queries to rows that are listed for each region.

    Args:
        q_BHNd, k_BGMd, v_BGMe: queries, keys and values.
        query_rows_Rc: the queries of every region.
        key_rows_L: the keys that the regions read.
        seen_S: which of its rows each query of a region sees, bool, [c, K] flat.
        spans_R3: of every region, where its rows begin and end, and where what is seen begins.
        at_N: where every query is among all regions' queries, flat.
        scale, softcap: of the scores.

    Returns:
        y [B, H, N, e].
    """
    core, found = _core(q_BHNd, k_BGMd, v_BGMe, scale, softcap), []
    for queries, (begin, end, sees) in zip(query_rows_Rc, spans_R3.tolist(), strict=True):
        rows, pairs = key_rows_L[begin:end], len(queries) * (end - begin)
        seen = _never_empty(seen_S[sees : sees + pairs].view(len(queries), -1))
        k, v = k_BGMd[:, :, rows], v_BGMe[:, :, rows]
        found.append(attend(q_BHNd[:, :, queries], k, v, core, seen[None, None]))
    return torch.cat(found, 2)[:, :, at_N].contiguous()


@region_attention.register_fake
def _region_fake(
    q: Tensor, k: Tensor, v: Tensor, query_rows: Tensor, key_rows: Tensor, seen: Tensor,
    spans: Tensor, at: Tensor, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], at.shape[0], v.shape[3])


@torch.library.custom_op("reattend::chosen_attention", mutates_args=())
def chosen_attention(
    q_BHNd: Tensor, k_BGMd: Tensor, v_BGMe: Tensor, query_rows_Rc: Tensor, key_rows_BHRK: Tensor,
    seen: Tensor, at_N: Tensor, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention of regions of queries to rows that each head reads for each region.

    Args:
        q_BHNd, k_BGMd, v_BGMe: queries, keys and values.
        query_rows_Rc: the queries of every region.
        key_rows_BHRK: the keys that it reads.
        seen: which of those each query sees, bool, as [B, H, R, c, K], where any of the first four
            sizes may be 1.
        at_N: where every query is among all regions' queries, flat.
        scale, softcap: of the scores.

    Returns:
        y [B, H, N, e].
    """
    core = _core(q_BHNd, k_BGMd, v_BGMe, scale, softcap)
    heads, regions = q_BHNd.shape[1], query_rows_Rc.shape[0]
    seen = seen.expand(len(q_BHNd), heads, regions, -1, -1)
    share = heads // k_BGMd.shape[1]
    found = []
    for r in range(regions):
        rows = key_rows_BHRK[:, :, r, :, None]
        k, v = (
            x.repeat_interleave(share, 1).gather(2, rows.expand(-1, -1, -1, x.shape[3]))
            for x in (k_BGMd, v_BGMe)
        )
        q = q_BHNd[:, :, query_rows_Rc[r]]
        full = core.model_copy(update={"kv_heads": heads})
        found.append(attend(q, k, v, full, _never_empty(seen[:, :, r])))
    return torch.cat(found, 2)[:, :, at_N].contiguous()


@chosen_attention.register_fake
def _chosen_fake(
    q: Tensor, k: Tensor, v: Tensor, query_rows: Tensor, key_rows: Tensor, seen: Tensor,
    at: Tensor, scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:2], at.shape[0], v.shape[3])


def _core(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> CoreConfig:
    return CoreConfig(
        heads=q.shape[1], kv_heads=k.shape[1], qk_head_dim=q.shape[3], v_head_dim=v.shape[3],
        scale=scale, softcap=softcap, pattern="full",
    )  # fmt: skip


def _never_empty(seen: Tensor) -> Tensor:
    """A row of padding sees everything, so that it stays finite."""
    return seen | ~seen.any(-1, keepdim=True)
