"""Queries at any ascending positions through torch's fused CPU attention, a stretch at a time.

torch's kernel knows positions only as a mask, and computes what a mask hides: a stretch of queries
is given the keys up to its last position, so about what causality hides is left out all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.core import Cache, Rule
from reattend.kernels.masking import visible_keys

#: queries of a stretch; more of them waste keys behind the first, fewer waste calls
STRETCH = 128


def fits(q_11hnd: Tensor, cache: Cache, pos_1n: Tensor, rule: Rule) -> bool:
    """Whether the kernel computes this: no softcap, one width, every query sees a key."""
    if q_11hnd.device.type != "cpu" or rule.softcap or not rule.causal:
        return False
    if q_11hnd.shape[-1] != cache.values.shape[-1]:
        return False
    first, start, length = int(pos_1n[0, 0]), int(cache.start[0]), int(cache.length[0])
    return 0 <= start <= first and int(pos_1n[0, -1]) < length <= cache.values.shape[2]


def attend_fused(
    q_11hnd: Tensor, cache: Cache, pos_1n: Tensor, rule: Rule
) -> tuple[Tensor, Tensor]:
    """What `attend_blocked` computes, where `fits`: y (1, 1, h, n, e) and lse (1, 1, h, n).

    Args:
        q_11hnd: queries of one KV group.
        cache: keys (1, 1, M, d) and values of the group.
        pos_1n: absolute index of each query, ascending.
        rule: causal, perhaps with a window.
    """
    (keys,), n, start = cache.keys, pos_1n.shape[1], int(cache.start[0])
    outputs = []
    for i in range(0, n, STRETCH):
        pos = pos_1n[:, i : i + STRETCH]
        lo, hi = start, int(pos[0, -1]) + 1
        if rule.sliding_window:
            lo = max(lo, int(pos[0, 0]) - rule.sliding_window + 1)
        seen_1nM = visible_keys(
            cache.start, cache.length, pos, torch.arange(lo, hi),
            causal=True, sliding_window=rule.sliding_window,
        )  # fmt: skip
        bias = torch.zeros(seen_1nM.shape, dtype=q_11hnd.dtype)
        bias = bias.masked_fill_(~seen_1nM, float("-inf"))[:, None]
        outputs.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_11hnd[:, 0, :, i : i + STRETCH],
                keys[:, :, lo:hi],
                cache.values[:, :, lo:hi],
                attn_mask=bias,
                scale=rule.scale,
            )  # fmt: skip
        )
    y, lse = (torch.cat(parts, 2)[:, None] for parts in zip(*outputs, strict=True))
    return y, lse
