"""The torch ops that become the sparse nodes; they exist to be traced and to say what those mean.

Layout letters: B batch, N new tokens, C capacity, H query heads, G key/value heads, d and e widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend
from reattend.patterns.pattern import HeadPattern


def _core(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, scale: float, softcap: float, window: int = 0
) -> CoreConfig:
    """What heads of these shapes compute, in a block with or without a window of its own."""
    return CoreConfig(
        heads=q_BHNd.shape[1], kv_heads=k_BGNd.shape[1], qk_head_dim=q_BHNd.shape[3],
        v_head_dim=v_BGNe.shape[3], scale=scale, softcap=softcap,
        pattern="sliding" if window else "causal", window=window,
    )  # fmt: skip


@torch.library.custom_op(
    "reattend::sink_window_attention",
    mutates_args=(),
    schema="(Tensor q_BHNd, Tensor k_BGNd, Tensor v_BGNe, Tensor past_key, Tensor past_value,"
    " Tensor kv_start_B, Tensor kv_len_B, *, int sinks, int window, float scale,"
    " int sliding_window=0, float softcap=0.0) -> (Tensor, Tensor, Tensor)",
)
def sink_window_attention(
    q_BHNd: Tensor,
    k_BGNd: Tensor,
    v_BGNe: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the first `sinks` tokens and the last `window`, over a state of bounded size.

    N tokens are N steps of one: write the token's row, then look at the state.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of the new tokens.
        past_key, past_value: [B, G, sinks + window, d or e]: the first tokens of each row, then a
            ring in which token t of the batch, padding counted, stands at t mod window.
        kv_start_B: padding of each row, on the left.
        kv_len_B: tokens so far, padding and the new ones included; the same in every row.
        sinks, window: of the pattern.
        scale, softcap: of the scores.
        sliding_window: of the block; 0: none. Sinks further back are hidden.

    Returns:
        y [B, H, N, e], and both states after the last token.
    """
    keys, values = past_key.clone(), past_value.clone()
    batch, _, n, _ = q_BHNd.shape
    core = _core(q_BHNd, k_BGNd, v_BGNe, scale, softcap)
    each, slot = torch.arange(batch), torch.arange(window)
    found = []
    for index in range(n):
        now = int(kv_len_B[0]) - n + index
        place_B = now - kv_start_B.long()
        at = torch.where(place_B < sinks, place_B.clamp_min(0), sinks + now % window)
        keys[each, :, at], values[each, :, at] = k_BGNd[:, :, index], v_BGNe[:, :, index]
        ring = place_B[:, None] - (now - slot) % window
        first = torch.arange(sinks).expand(batch, sinks)
        seen = torch.cat([first <= place_B[:, None], ring >= sinks], 1)
        if sliding_window:
            near = place_B[:, None] - torch.cat([first, ring], 1) < sliding_window
            seen = seen & near
        seen = seen | (place_B < 0)[:, None]  # a padded row stays finite
        q = q_BHNd[:, :, index : index + 1]
        found.append(attend(q, keys, values, core, seen[:, None, None]))
    return torch.cat(found, 2), keys, values


@sink_window_attention.register_fake
def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    start: Tensor,
    length: Tensor,
    *,
    sinks: int,
    window: int,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    y = q.new_empty(*q.shape[:3], v.shape[3])
    return y, past_key.new_empty(past_key.shape), past_value.new_empty(past_value.shape)


@torch.library.custom_op(
    "reattend::pattern_attention",
    mutates_args=(),
    schema="(Tensor q_BHNd, Tensor k_BGCd, Tensor v_BGCe, Tensor kv_start_B, Tensor kv_len_B, *,"
    " str pattern, float scale, int sliding_window=0, float softcap=0.0) -> Tensor",
)
def pattern_attention(
    q_BHNd: Tensor,
    k_BGCd: Tensor,
    v_BGCe: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    pattern: str,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention to what a pattern shows of a state of every row.

    Args:
        q_BHNd: of the new tokens.
        k_BGCd, v_BGCe: every row so far, the new ones included.
        kv_start_B, kv_len_B: first real row and one past the last.
        pattern: a `HeadPattern` as JSON.
        scale, softcap: of the scores.
        sliding_window: of the block; 0: none.
    """
    n = q_BHNd.shape[2]
    core = _core(q_BHNd, k_BGCd, v_BGCe, scale, softcap, sliding_window)
    start, index = kv_start_B.long(), kv_len_B.long()[:, None] - n + torch.arange(n)
    i, j = index - start[:, None], torch.arange(k_BGCd.shape[2]) - start[:, None]
    seen = HeadPattern.model_validate_json(pattern).sees(i[:, :, None], j[:, None], core)
    seen = seen | (index[:, :, None] == torch.arange(k_BGCd.shape[2]))  # padding stays finite
    return attend(q_BHNd, k_BGCd, v_BGCe, core, seen[:, None])


@pattern_attention.register_fake
def _pattern_fake(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, *,
    pattern: str, scale: float, sliding_window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op(
    "reattend::kept_attention",
    mutates_args=(),
    schema="(Tensor q_BHNd, Tensor k_BGNd, Tensor v_BGNe, Tensor ring_key, Tensor ring_value,"
    " Tensor kept_key, Tensor kept_value, Tensor kv_start_B, Tensor kv_len_B, *, str pattern,"
    " float scale, int sliding_window=0, float softcap=0.0) -> (Tensor, Tensor, Tensor, Tensor,"
    " Tensor)",
)
def kept_attention(
    q_BHNd: Tensor,
    k_BGNd: Tensor,
    v_BGNe: Tensor,
    ring_key: Tensor,
    ring_value: Tensor,
    kept_key: Tensor,
    kept_value: Tensor,
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    pattern: str,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention to what a KV-monotone pattern shows, over states of what later queries may see.

    N tokens are N steps of one: write the token's row, then look at both states.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of the new tokens.
        ring_key, ring_value: [B, G, W, d or e]: token t of the batch, padding counted, stands at
            t mod W; W is at least the widest window of these tokens.
        kept_key, kept_value: [B, G, K, d or e]: tokens that every later query sees by their own
            positions, in order, and behind them a row of no meaning.
        kv_start_B, kv_len_B: as of `sink_window_attention`.
        pattern: a `HeadPattern` as JSON.
        scale, softcap: of the scores.
        sliding_window: of the block; 0: none.

    Returns:
        y [B, H, N, e], and the four states after the last token.
    """
    rings, keeps = (ring_key.clone(), ring_value.clone()), (kept_key.clone(), kept_value.clone())
    batch, _, n, _ = q_BHNd.shape
    core = _core(q_BHNd, k_BGNd, v_BGNe, scale, softcap, sliding_window)
    meant = HeadPattern.model_validate_json(pattern)
    total, width, rows = int(kv_len_B[0]), ring_key.shape[2], kept_key.shape[2]
    kept_T = meant.by_key(torch.arange(total))
    before_T = kept_T.long().cumsum(0) - kept_T.long()
    places = torch.full((rows,), total)  # of what is kept; behind it none
    places[: int(kept_T.sum())] = kept_T.nonzero()[:, 0]
    each, slot = torch.arange(batch), torch.arange(width)
    found = []
    for index in range(n):
        now = total - n + index
        place_B = now - kv_start_B.long()
        at_B = before_T[place_B.clamp_min(0)]
        for ring, kept, new in zip(rings, keeps, (k_BGNd, v_BGNe), strict=True):
            ring[:, :, now % width] = new[:, :, index]
            kept[each, :, at_B] = new[:, :, index]
        j = place_B[:, None] - (now - slot) % width
        j = torch.where((j >= 0) & ~kept_T[j.clamp_min(0)], j, total)
        j = torch.cat([places.expand(batch, rows), j], 1)
        seen = meant.sees(place_B[:, None, None], j[:, None], core)
        seen = seen | (place_B < 0)[:, None, None]  # a padded row stays finite
        keys, values = (torch.cat(pair, 2) for pair in zip(keeps, rings, strict=True))
        q = q_BHNd[:, :, index : index + 1]
        found.append(attend(q, keys, values, core, seen[:, None]))
    return torch.cat(found, 2), *rings, *keeps


@kept_attention.register_fake
def _kept_fake(
    q: Tensor, k: Tensor, v: Tensor, ring_key: Tensor, ring_value: Tensor, kept_key: Tensor,
    kept_value: Tensor, start: Tensor, length: Tensor, *,
    pattern: str, scale: float, sliding_window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = q.new_empty(*q.shape[:3], v.shape[3])
    return (
        y, torch.empty_like(ring_key), torch.empty_like(ring_value), torch.empty_like(kept_key),
        torch.empty_like(kept_value),
    )  # fmt: skip
