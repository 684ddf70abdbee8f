"""A sparse class of heads over the rows of one call, through the block op.

Layout letters: B batch, N tokens, d and e key and value head widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.base import Kept
from reattend.mixers.config import CoreConfig
from reattend.mixers.shared_layouts import Layouts
from reattend.patterns.pattern import HeadPattern

#: shorter calls are one or two blocks: a mask is as fast
LEAST = 192


def by_blocks(
    q_BHNd: Tensor, kept: Kept, pattern: HeadPattern, core: CoreConfig, layouts: Layouts
) -> Tensor | None:
    """The heads' output [B, H, N, e]; None where the op has no advantage or does not fit.

    It fits where the rows are the queries' own tokens, with padding on the left only.
    """
    n = q_BHNd.shape[2]
    if pattern.full or n < LEAST or kept.keys.shape[2] != n or torch.compiler.is_compiling():
        return None
    place_BN = kept.query_place_BN
    start_B = (place_BN < 0).sum(-1)
    told = torch.arange(n, device=place_BN.device) - start_B[:, None]
    if not bool((place_BN == told.clamp_min(-1)).all()):
        return None
    from reattend.kernels.sparse_attention import sparse_attention

    heads, batch = q_BHNd.shape[1], q_BHNd.shape[0]
    layout = layouts.get(pattern, core, n, q_BHNd.device)
    if layout is None:
        return None
    every = layout.head_layout.expand(heads).contiguous()
    start_B = start_B.expand(batch).contiguous()
    y, _ = sparse_attention(
        q_BHNd, kept.keys, kept.values, *layout.tensors[:4], every, start_B,
        torch.full_like(start_B, n), layout.block, layout.first, core.scale, core.softcap,
    )  # fmt: skip
    return y  # type: ignore[no-any-return]
