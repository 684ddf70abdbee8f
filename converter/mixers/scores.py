"""softmax(q k^T) v under a mask the model passed or a pattern of our own. Plain torch.

Layout letters: B batch, N query length, M key length, H query heads, G kv heads, d, e widths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.errors import ArgumentError, UnsupportedCacheError
from reattend.mixers.config import CoreConfig


def attend(
    q_BHNd: Tensor,
    k_BGMd: Tensor,
    v_BGMe: Tensor,
    core: CoreConfig,
    mask: Tensor | None,
    bias_1HNM: Tensor | None = None,
    sinks_H11: Tensor | None = None,
) -> Tensor:
    """Attention output [B, H, N, e]; differentiable.

    Args:
        q_BHNd, k_BGMd, v_BGMe: queries, keys, values; H is a multiple of G.
        core: scale, softcap and pattern.
        mask: as in `Context.mask`.
        bias_1HNM: added to the scores after softcap.
        sinks_H11: logits that take part in the softmax beside the keys', [.., H, N or 1, 1].
    """
    n, m = q_BHNd.shape[2], k_BGMd.shape[2]
    bias = visibility(mask, core, n, m, q_BHNd)
    if bias_1HNM is not None:
        bias = biased(bias, bias_1HNM.to(q_BHNd.dtype))
    grouped = k_BGMd.shape[1] != q_BHNd.shape[1]
    if not core.softcap and sinks_H11 is None:
        return F.scaled_dot_product_attention(
            q_BHNd, k_BGMd, v_BGMe, attn_mask=bias, scale=core.scale, enable_gqa=grouped
        )
    repeat = q_BHNd.shape[1] // k_BGMd.shape[1]
    k, v = k_BGMd.repeat_interleave(repeat, 1), v_BGMe.repeat_interleave(repeat, 1)
    return torch.matmul(probabilities(q_BHNd, k, core, bias, sinks_H11).to(v.dtype), v)


def probabilities(
    q_BHNd: Tensor,
    k_BHMd: Tensor,
    core: CoreConfig,
    bias: Tensor | None,
    sinks_H11: Tensor | None = None,
) -> Tensor:
    """What each query gives to each key [B, H, N, M], float32 or wider; a row of padding is zero.

    Args:
        q_BHNd, k_BHMd: queries and keys, as many heads of each.
        core: scale and softcap.
        bias: what is hidden (bool, True: visible) or added to the scores.
        sinks_H11: as in `attend`; what they take is missing from the rows' sums.
    """
    scores = torch.matmul(q_BHNd, k_BHMd.transpose(-1, -2)) * core.scale
    if core.softcap:
        scores = core.softcap * torch.tanh(scores / core.softcap)
    if bias is not None:
        hidden = ~bias if bias.dtype == torch.bool else None
        scores = scores.masked_fill(hidden, float("-inf")) if hidden is not None else scores + bias
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if sinks_H11 is not None:
        column = sinks_H11.to(wide.dtype).expand(*wide.shape[:-1], 1)
        return torch.softmax(torch.cat([wide, column], -1), -1)[..., :-1]
    return torch.nan_to_num(torch.softmax(wide, -1), nan=0.0)


def per_head(sinks_H: Tensor | None) -> Tensor | None:
    """Sinks as `attend` takes them."""
    return None if sinks_H is None else sinks_H[:, None, None]


def biased(mask: Tensor | None, bias_1HNM: Tensor) -> Tensor:
    """An additive mask that hides what `mask` (bool or additive) hides and adds the bias elsewhere.

    Hidden scores become the dtype's lowest number, not -inf: a row that sees nothing (padding)
    then stays finite.
    """
    if mask is None:
        return bias_1HNM
    if mask.dtype == torch.bool:
        return torch.where(mask, bias_1HNM, torch.finfo(bias_1HNM.dtype).min)
    return mask + bias_1HNM


def shown(mask: Tensor) -> Tensor:
    """True where a bool or additive mask lets a key be seen, whatever it adds there."""
    if mask.dtype == torch.bool:
        return mask
    return mask > (-6e4 if mask.dtype == torch.float16 else -1e30)


def visibility(
    mask: Tensor | None, core: CoreConfig, n: int, m: int, like: Tensor
) -> Tensor | None:
    """The mask to apply to scores [B, H, N, M], or None when every key is visible.

    A 4-D mask from the model is the whole truth about its own cache and is used as it is
    (additive ones in the scores' dtype). Otherwise the pattern holds, with the N queries at the
    end of the M keys, and 2-D validity hides padded keys.

    Raises:
        ArgumentError: the pattern is the model's own mask, and there is none.
    """
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :m]
        return mask if mask.dtype == torch.bool else mask.to(like.dtype)
    if core.pattern == "opaque":
        core = _unmasked(core, mask)
    pattern = _pattern(core, n, m, like.device)
    if mask is None or mask.dim() != 2:
        return pattern
    valid_B11M = (mask != 0)[:, None, None, -m:]
    return valid_B11M if pattern is None else pattern & valid_B11M


def refuse_opaque(core: CoreConfig) -> None:
    """A state of fixed capacity says which rows are filled, not which of them may be seen.

    Raises:
        UnsupportedCacheError: the pattern is the model's own mask.
    """
    if core.pattern == "opaque":
        raise UnsupportedCacheError(
            "a block that attends by the model's own mask was given a fixed-capacity state",
            next_step="run the model with a transformers cache, or without one",
        )


def _unmasked(core: CoreConfig, mask: Tensor | None) -> CoreConfig:
    """What an opaque block does without a 4-D mask, where the original was seen to do it too."""
    if mask is None and core.unmasked:
        return core.model_copy(update={"pattern": core.unmasked})
    given = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
    raise ArgumentError(
        f"a block that attends by the model's own mask was given {given}",
        why="what its queries may see is not a fixed pattern, so it cannot be made up here",
        next_step="call it with the mask [batch, 1, query, key] that the original was called with",
    )


def _pattern(core: CoreConfig, n: int, m: int, device: torch.device) -> Tensor | None:
    """Boolean [1, 1, N, M] of the block's own pattern, None if nothing is hidden."""
    if not core.causal or (n == 1 and core.pattern == "causal"):
        return None
    i = torch.arange(m - n, m, device=device)[:, None]
    j = torch.arange(m, device=device)[None, :]
    return own_pattern(core, i, j)[None, None]


def own_pattern(core: CoreConfig, i: Tensor, j: Tensor) -> Tensor:
    """What the block's own pattern lets queries at positions i see of keys at j; they broadcast."""
    if not core.causal:
        return torch.ones((), dtype=torch.bool, device=i.device).expand(
            torch.broadcast_shapes(i.shape, j.shape)
        )
    seen = j <= i
    if core.pattern == "sliding":
        seen = seen & (j > i - core.window)
    elif core.pattern == "chunked":
        seen = seen & (j // core.chunk == i // core.chunk)
    return seen


def own_range(core: CoreConfig, i: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`own_pattern` as the (first, last) key that each query sees; neither moves back."""
    if not core.causal:
        return torch.zeros_like(i), torch.full_like(i, length - 1)
    first = torch.zeros_like(i)
    if core.pattern == "sliding":
        first = i - core.window + 1
    elif core.pattern == "chunked":
        first = i - i % core.chunk
    return first, i


def attend_rows(
    q_B1Hw: Tensor, k_B1Mw: Tensor, v_B1Mr: Tensor, core: CoreConfig, mask: Any,
    bias_11HM: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One query token: its H heads as rows over one shared key head; the mask is per key."""
    per_key = visibility(mask, core, 1, k_B1Mw.shape[2], q_B1Hw)
    if per_key is not None and per_key.shape[-3] > 1:  # a mask for every head
        per_key = per_key.transpose(-3, -2)
    full = core.model_copy(update={"pattern": "full", "window": 0, "chunk": 0})
    return attend(q_B1Hw, k_B1Mw, v_B1Mr, full, per_key, bias_11HM, sinks)
