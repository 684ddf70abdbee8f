"""The torch op that becomes the node of a class of heads that select keys at run time.

It exists to be traced and to say what the node means, in terms of `reattend.mixers.selecting`.

Layout letters: B batch, N new tokens, C capacity, H query heads, G key/value heads, d and e widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.base import Kept
from reattend.mixers.config import CoreConfig
from reattend.mixers.selecting.frame import attend_selected
from reattend.mixers.selecting.memo import Memo
from reattend.mixers.selecting.methods import method
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selector import Selector
from reattend.patterns.selectors import Recorded


@torch.library.custom_op(
    "reattend::selected_attention",
    mutates_args=(),
    schema="(Tensor q_BHNd, Tensor k_BGNd, Tensor v_BGNe, Tensor past_key, Tensor past_value,"
    " Tensor more, Tensor[] weights, Tensor kv_start_B, Tensor kv_len_B, *, str pattern,"
    " float scale, int sliding_window=0, float softcap=0.0) -> (Tensor, Tensor, Tensor, Tensor)",
)
def selected_attention(
    q_BHNd: Tensor,
    k_BGNd: Tensor,
    v_BGNe: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    more: Tensor,
    weights: list[Tensor],
    kv_start_B: Tensor,
    kv_len_B: Tensor,
    *,
    pattern: str,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the new rows, then attend to what the pattern's terms and its selector show.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of the new tokens.
        past_key, past_value: [B, G, C, d or e]: row j is token j of its sequence, padding left out.
        more: what the selector keeps beside them, [B, G, ?, ?], which follows from the keys and is
            neither read nor written here; or tokens that another layer noted, [B, H, 1, K]; or
            anything.
        weights: the selector's own, in the order of its state dict.
        kv_start_B: padding of each row, on the left.
        kv_len_B: tokens so far, padding and the new ones included; the same in every row.
        pattern: a `HeadPattern` with a selector, as JSON.
        scale, softcap: of the scores.
        sliding_window: of the block; 0: none.

    Returns:
        y [B, H, N, e], both states after the last token, and what was noted, or `more`.
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
    memo = None
    if isinstance(select, Recorded):
        memo = Memo()
        if select.source is not None:
            memo.write(torch.arange(len(q_BHNd)), 0, more, len(q_BHNd))
    kept = Kept(keys, values, place_BM, place_BN.clamp_min(-1), memo)
    chooser = method(select, core, None).to(q_BHNd.dtype)
    chooser.load_state_dict(dict(zip(chooser.state_dict(), weights, strict=True)))
    y = attend_selected(q_BHNd, kept, described, core, chooser)
    noted = _noted(select, more, q_BHNd)
    if noted is not more and memo is not None and memo.rows_BGQw is not None:
        noted = memo.rows_BGQw
    return y, keys, values, noted.clone()


def _noted(select: Selector, more: Tensor, q_BHNd: Tensor) -> Tensor:
    """`more`, or a place for what a layer notes."""
    if not isinstance(select, Recorded) or select.layer not in select.at:
        return more
    return q_BHNd.new_zeros(*q_BHNd.shape[:2], 1, select.topk, dtype=torch.int64)


@selected_attention.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, more: Tensor,
    weights: list[Tensor], start: Tensor, length: Tensor, *,
    pattern: str, scale: float, sliding_window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = q.new_empty(*q.shape[:3], v.shape[3])
    select = HeadPattern.model_validate_json(pattern).select
    assert select is not None
    states = (past_key, past_value, _noted(select, more, q))
    first, second, third = (x.new_empty(x.shape) for x in states)
    return y, first, second, third
