"""The closed-form gradient of `chunked.forward`: the same sums, read from the other side.

With ``A_nj = q_n . k_j`` and weights ``w_nj``: ``dq_n = sum_j w (dy_n . v_j) k_j`` is the op itself
with other arguments; ``dk_j`` and ``dv_j`` are sums over later queries, a scan from the end. Each
decay moves every weight that spans it: ``d c_n = q_n . dq_n - k_n . dk_n``, summed from the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.linear_attention.chunked import Chunks, Decays, forward, weights


def backward(
    dy_BHNe: Tensor,
    dstate_BGfe: Tensor,
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    decay_BGN: Tensor | None,
    state_BGfe: Tensor,
    lag: int,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay (zeros where there is none) and state."""
    groups = k_BGNf.shape[1]
    swapped = state_BGfe.transpose(-1, -2)
    dq, _ = forward(dy_BHNe, v_BGNe, k_BGNf, decay_BGN, swapped, lag, block)
    chunks = Chunks.of(q_BHNf.shape[2], lag, block)
    decays = Decays.of(decay_BGN, chunks)
    q, dy = (chunks.cut(x.unflatten(1, (groups, -1))) for x in (q_BHNf, dy_BHNe))
    k, v = chunks.cut(k_BGNf), chunks.cut(v_BGNe)
    # through the states
    now = q if decays is None else q * decays.within.exp()[:, :, None, ..., None]
    asked = (now.transpose(-1, -2) @ dy).sum(2)
    later, first = _later(asked, dstate_BGfe, decays, chunks)
    left = None if decays is None else (decays.whole[..., None] - decays.within).exp()[..., None]
    by_v, by_k = v @ later.transpose(-1, -2), k @ later
    dk, dv = (by_v, by_k) if left is None else (by_v * left, by_k * left)
    if chunks.paired:  # inside of the bands
        w = weights(decays, chunks, q.device)
        scores = (q @ chunks.band(k).transpose(-1, -2)[:, :, None]) * w
        pulls = (dy @ chunks.band(v).transpose(-1, -2)[:, :, None]) * w
        dv = dv + chunks.folded((scores.transpose(-1, -2) @ dy).sum(2))
        dk = dk + chunks.folded((pulls.transpose(-1, -2) @ q).sum(2))
    dk, dv = chunks.joined(dk), chunks.joined(dv)
    if decay_BGN is None:
        return dq, dk, dv, q.new_zeros(0), first
    end = forward(q_BHNf, k_BGNf, v_BGNe, decay_BGN, state_BGfe, lag, block)[1]
    tail = (dstate_BGfe * end).sum((-1, -2))
    return dq, dk, dv, decay_gradient(q_BHNf, dq, k_BGNf, dk, tail), first


def decay_gradient(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, tail: Tensor) -> Tensor:
    """``d c_n = q_n . dq_n - k_n . dk_n``, summed from the end, [B, G, N].

    Args:
        q, dq, k, dk: with the features' gradients.
        tail: what the whole decay is worth to the state after all keys, [B, G]; or [B, G, f],
            where every feature decays by itself: the products are not summed then, and so is the
            result [B, G, N, f].
    """
    moved = moved_by_decays(q, dq, k, dk)
    return from_the_end(moved if tail.dim() == 3 else moved.sum(-1), tail)


def moved_by_decays(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Tensor:
    """``q_n * dq_n - k_n * dk_n``, feature by feature, [B, G, N, f]."""
    moved: Tensor = (q * dq).unflatten(1, (k.shape[1], -1)).sum(2) - k * dk
    return moved


def from_the_end(x: Tensor, tail: Tensor, dim: int = 2) -> Tensor:
    """Sums from every place of a dimension to its end, and ``tail``, which is without it."""
    summed: Tensor = x.flip(dim).cumsum(dim).flip(dim) + tail.unsqueeze(dim)
    return summed


def _later(
    asked_BGTfe: Tensor, last_BGfe: Tensor, decays: Decays | None, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """What is asked of the state at the end of each chunk by those that read its keys there.

    Returns:
        [B, G, T, f, e], and the gradient of the state before the first chunk.
    """
    found = []
    after, skipped = last_BGfe, last_BGfe
    for t in range(chunks.count - 1, -1, -1):
        found.append(skipped if chunks.wide else after)
        left = after if decays is None else after * decays.whole[:, :, t, None, None].exp()
        # queries of a wide band read the chunk before them in the band
        after, skipped = left + asked_BGTfe[:, :, t], left
    return torch.stack(found[::-1], 2), after
