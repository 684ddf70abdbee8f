"""The torch ops that become the sparse nodes; they exist to be traced and to say what those mean.

Layout letters: B batch, N new tokens, C capacity, H query heads, G key/value heads, d and e widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend
from reattend.patterns.pattern import HeadPattern


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
    batch, heads, n, _ = q_BHNd.shape
    core = CoreConfig(
        heads=heads, kv_heads=k_BGNd.shape[1], qk_head_dim=q_BHNd.shape[3],
        v_head_dim=v_BGNe.shape[3], scale=scale, softcap=softcap,
    )  # fmt: skip
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
    heads, n = q_BHNd.shape[1], q_BHNd.shape[2]
    core = CoreConfig(
        heads=heads, kv_heads=k_BGCd.shape[1], qk_head_dim=q_BHNd.shape[3],
        v_head_dim=v_BGCe.shape[3], scale=scale, softcap=softcap,
        pattern="sliding" if sliding_window else "causal", window=sliding_window,
    )  # fmt: skip
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
