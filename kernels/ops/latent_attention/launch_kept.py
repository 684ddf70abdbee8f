"""The gradient of `reattend::latent_attention` with probabilities that are computed once.

The kernel for queries leaves probabilities and their gradients in memory, the one for the cache
reads them: 5 r + 3 R products per visible pair in place of 7 r + 4 R. Queries go in chunks, so that
memory is bounded. No table chooses it yet: `kernels/bench/sweep.py` tells where it is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.core import Rule
from reattend.kernels.latent_attention.launch_backward import (
    Configs,
    Gradients,
    Inputs,
    launch_parts,
)

ROOM = 1 << 29  # bytes for what is kept


def launch_kept(
    grads: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    inputs: Inputs,
    rule: Rule,
    configs: Configs,
    room: int = ROOM,
) -> Gradients:
    """`launch_backward` of a causal rule.

    Args:
        grads: of u_BHNr and lse_BHN.
        outputs: u_BHNr and lse_BHN.
        inputs: q_nope, q_rope, latent, rope, kv_start and kv_len; the cache has no pages.
        rule: as there; a chunk ends at the last key that its queries see, so it must be causal.
        configs: as there; that of the cache is of a kernel that makes no scores.
        room: bytes that may be kept; at least one query is.
    """
    q, w, latent, rope, start, end = inputs
    (b, h, n, _), m = q.shape, latent.shape[1]
    step = max(1, min(n, room // max(1, 2 * b * h * m * q.element_size())))
    dq, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, w))
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in (latent, rope)]
    for first in range(0, n, step):
        some = slice(first, min(first + step, n))
        given, made, rows = ((x[:, :, some], y[:, :, some]) for x, y in (grads, outputs, (q, w)))
        kept = q.new_empty(2, b, some.stop - first, h, m)
        chunk = (*rows, latent, rope, start, end - (n - some.stop))
        dq[:, :, some], dw[:, :, some], *parts = launch_parts(
            given, made, chunk, rule, configs, kept=kept
        )
        for total, part in zip(sums, parts, strict=True):
            total += part.sum(0, dtype=torch.float32)
    return dq, dw, sums[0].to(latent.dtype), sums[1].to(rope.dtype)
