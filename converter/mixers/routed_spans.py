"""Whether attention that leaves heads out can be computed by its op, and whether that pays.

Layout letters: B batch, N queries, M keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.routed_config import RoutedConfig
from reattend.mixers.scores import shown

#: Queries from which a call is a prefill: below, torch's own attention is memory-bound.
FEW = 16
#: On a CPU (kernels/bench/routed_cpu.py): the share of heads up to which prefill is faster where
#: single heads, or KV groups of several, are left out; what one KV group costs to begin, in numbers
#: of keys and values that could be read meanwhile.
HEADS, GROUPS, BEGIN = 0.5, 0.8, 330_000


class Span(NamedTuple):
    """What the op is told of keys: see `reattend.kernels.routed_attention.reference`."""

    kv_start_B: Tensor
    kv_len_B: Tensor
    causal: bool
    sliding_window: int


def pays(config: RoutedConfig, device: torch.device, n: int, m: int) -> bool:
    """Whether leaving out what the routers leave out is faster than computing it.

    Args:
        config: of the block.
        device: where it runs; on a GPU the op's kernels are as fast as those of dense attention.
        n: queries.
        m: keys.
    """
    if device.type != "cpu":
        return True
    together = config.core.heads // config.core.kv_heads
    by_group = config.route == "kv-group"
    if n > FEW:
        return n >= 128 and config.active <= (GROUPS if by_group and together > 1 else HEADS)
    if not by_group:
        return False
    read = config.shared + config.top_k
    width = config.core.qk_head_dim + config.core.v_head_dim
    return (config.units - read) * m * width >= read * BEGIN


def span_of(mask: Tensor | None, core: CoreConfig, q_BHNd: Tensor, m: int) -> Span | None:
    """The keys that queries at their end may see, where two numbers per row and the block's own
    pattern say it all; else None.

    Args:
        mask: as in `Context.mask`.
        core: the block's pattern.
        q_BHNd: queries.
        m: keys.
    """
    (b, _, n, _), device = q_BHNd.shape, q_BHNd.device
    key_M = torch.arange(m, device=device)
    plain = core.pattern in ("full", "causal", "sliding")
    if mask is None or mask.dim() == 2:
        if not plain or (n > m and core.causal):
            return None
        start_B = torch.zeros(b, dtype=torch.int64, device=device)
        if mask is not None:
            real_BM = mask[:, -m:] != 0
            start_B = (~real_BM).sum(-1)
            if not bool((real_BM == (key_M >= start_B[:, None])).all()):
                return None
        length_B = torch.full_like(start_B, m)
        return Span(start_B, length_B, core.causal, core.window)
    if mask.shape[1] > 1 or mask.shape[2] != n or not (plain or n == 1):
        return None
    seen_BNM = shown(mask[:, 0, :, :m]).expand(b, n, -1)
    if mask.is_floating_point() and bool((seen_BNM & (mask[:, 0, :, :m] != 0)).any()):
        return None  # it also adds to the scores
    any_BM = seen_BNM.any(1)
    start_B = any_BM.int().argmax(-1)
    length_B = start_B + any_BM.sum(-1)
    own = Span(start_B, length_B, n > 1 and core.causal, core.window if n > 1 else 0)
    return own if bool(_same(seen_BNM, own, key_M)) else None


def _same(seen_BNM: Tensor, span: Span, key_M: Tensor) -> Tensor:
    """Whether queries that are not padding see what the span says."""
    from reattend.kernels.masking import query_positions, visible_keys

    start, length, causal, window = span
    pos_BN = query_positions(length, seen_BNM.shape[1])
    told = visible_keys(start, length, pos_BN, key_M, causal=causal, sliding_window=window)
    padding = (pos_BN < start[:, None])[..., None]
    return ((told == seen_BNM) | padding).all()
