"""The torch op that becomes the node of a class of heads that select keys at run time.

It exists to be traced and to say what the node means, in terms of `reattend.mixers.selecting`.

Layout letters: B batch, N new tokens, C capacity, H query heads, G key/value heads, d and e widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reattend.mixers.base import Kept
from reattend.mixers.config import CoreConfig, RotaryConfig
from reattend.mixers.selecting.frame import attend_selected
from reattend.mixers.selecting.memo import ROLLBACK, Memo
from reattend.mixers.selecting.methods import method
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selector import Selector
from reattend.patterns.selectors import Recorded


@torch.library.custom_op(
    "reattend::selected_attention",
    mutates_args=(),
    schema="(Tensor q_BHNd, Tensor k_BGNd, Tensor v_BGNe, Tensor past_key, Tensor past_value,"
    " Tensor more, Tensor recent, Tensor[] weights, Tensor kv_start_B, Tensor kv_len_B, *,"
    " str pattern, float scale, int sliding_window=0, float softcap=0.0, float[] inv_freq=[])"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def selected_attention(
    q_BHNd: Tensor,
    k_BGNd: Tensor,
    v_BGNe: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    more: Tensor,
    recent: Tensor,
    weights: list[Tensor],
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    pattern: str,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    inv_freq: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write the new rows, then attend to what the pattern's terms and its selector show.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of the new tokens.
        past_key, past_value: [B, G, C, d or e]: row j is token j of its sequence, padding left out.
        more: what the selector keeps beside them, [B, G, ?, ?]; or tokens that another layer noted,
            [B, H, 1, K]; or anything.
        recent: the queries of the last c tokens, [B, G, c, J d], token t at t mod c, where a
            selector needs them; or anything.
        weights: the selector's own, in the order of its state dict.
        kv_start_B: padding of each row, on the left.
        kv_len_B: tokens so far, padding and the new ones included; the same in every row.
        pattern: a `HeadPattern` with a selector, as JSON.
        scale, softcap: of the scores.
        sliding_window: of the block; 0: none.
        inv_freq: of the rotation that queries and keys have.

    Returns:
        y [B, H, N, e], both states after the last token, `more` or what was noted, and `recent`.
    """
    keys, values = past_key.clone(), past_value.clone()
    heads, n = q_BHNd.shape[1:3]
    core = CoreConfig(
        heads=heads, kv_heads=k_BGNd.shape[1], qk_head_dim=q_BHNd.shape[3],
        v_head_dim=v_BGNe.shape[3], scale=scale, softcap=softcap,
        pattern="sliding" if sliding_window else "causal", window=sliding_window,
    )  # fmt: skip
    place_BN = (kv_len_B.long() - n - kv_start_B.long())[:, None] + torch.arange(n)
    for row, place_N in enumerate(place_BN):
        real = place_N >= 0
        keys[row, :, place_N[real]] = k_BGNd[row, :, real]
        values[row, :, place_N[real]] = v_BGNe[row, :, real]
    held = torch.arange(keys.shape[2])
    place_BM = torch.where(held <= place_BN[:, -1:], held, -1)
    described = HeadPattern.model_validate_json(pattern)
    select = described.select
    assert select is not None
    rotary = RotaryConfig(inv_freq=tuple(inv_freq)) if inv_freq else None
    chooser = method(select, core, rotary).to(q_BHNd.dtype)
    chooser.load_state_dict(dict(zip(chooser.state_dict(), weights, strict=True)))
    memo = Memo() if chooser.block or isinstance(select, Recorded) else None
    if memo is not None and (not isinstance(select, Recorded) or select.source is not None):
        memo.rows_BGQw = more
    if memo is not None and chooser.recalls:
        _remember(memo, recent, place_BN[:, 0].clamp_min(0) - 1, heads)
    kept = Kept(keys, values, place_BM, place_BN.clamp_min(-1), memo)
    y = attend_selected(q_BHNd, kept, described, core, chooser)
    noted = _noted(select, more, q_BHNd)
    if memo is not None and memo.rows_BGQw is not None:
        noted = memo.rows_BGQw
    if chooser.recalls and memo is not None:
        recent = _recent(memo, recent, place_BN[:, -1])
    return y, keys, values, noted.clone(), recent.clone()


def _slots(last_B: Tensor, size: int) -> Tensor:
    """The token at each slot [B, c] of a ring behind these last tokens; negative: none."""
    return last_B[:, None] - (last_B[:, None] - torch.arange(size)) % size


def _remember(memo: Memo, recent_BGcw: Tensor, last_B: Tensor, heads: int) -> None:
    """Give the memo the queries of the tokens up to these."""
    batch, groups, block, _ = recent_BGcw.shape
    place_Bc, size = _slots(last_B, block), block + ROLLBACK
    rows_BHcd = recent_BGcw.unflatten(-1, (heads // groups, -1)).transpose(2, 3).flatten(1, 2)
    memo.last_BHRd = rows_BHcd.new_zeros(batch, heads, size, rows_BHcd.shape[3])
    memo.place_BR = torch.full((batch, size), -1)
    for row, place in enumerate(place_Bc):
        real = place >= 0
        memo.last_BHRd[row, :, place[real] % size] = rows_BHcd[row, :, real]
        memo.place_BR[row, place[real] % size] = place[real]


def _recent(memo: Memo, before_BGcw: Tensor, last_B: Tensor) -> Tensor:
    """The queries of the last tokens, of all rows that have some."""
    assert memo.last_BHRd is not None
    found, (groups, block) = before_BGcw.clone(), before_BGcw.shape[1:3]
    for row, place in enumerate(_slots(last_B, block)):
        real = place >= 0
        rows_Hcd = memo.last_BHRd[row, :, place[real] % (block + ROLLBACK)]
        found[row, :, real] = rows_Hcd.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    return found


def _noted(select: Selector, more: Tensor, q_BHNd: Tensor) -> Tensor:
    """`more`, or a place for what a layer notes."""
    if not isinstance(select, Recorded) or select.layer not in select.at:
        return more
    return q_BHNd.new_zeros(*q_BHNd.shape[:2], 1, select.topk, dtype=torch.int64)


@selected_attention.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, more: Tensor,
    recent: Tensor, weights: list[Tensor], start: Tensor, length: Tensor, *,
    pattern: str, scale: float, sliding_window: int = 0, softcap: float = 0.0,
    inv_freq: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = q.new_empty(*q.shape[:3], v.shape[3])
    select = HeadPattern.model_validate_json(pattern).select
    assert select is not None
    states = (past_key, past_value, _noted(select, more, q), recent)
    first, second, third, fourth = (x.new_empty(x.shape) for x in states)
    return y, first, second, third, fourth
