"""Torch reference of `reattend::linear_attention`: every pair of tokens, by the formula.

Plain, traceable and differentiable by autograd: what the op means. `chunked.py` is what computes
it. Letters: f features of a query or key, r query heads of a key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.kernels.core import compute_dtype

#: The least denominator: where features are zero, so is the output.
LEAST = 1e-12


def last_seen(n: int, lag: int, block: int, device: torch.device) -> Tensor:
    """The last key that each of n queries sees, -1 or less where it sees none."""
    place_N = torch.arange(n, device=device)
    return place_N // block * block - lag


def linear_attention(
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    decay_BGN: Tensor | None = None,
    state_BGfe: Tensor | None = None,
    lag: int = 0,
    block: int = 1,
    normalize: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y_n = sum_j exp(c_n - c_j) (q_n . k_j) v_j + exp(c_n) q_n S``, c the running sum of decays.

    Query n sees key j where ``j <= floor(n / block) block - lag``: `lag` 0 is causal attention, the
    query's own key included; ``lag = w`` leaves out the last w keys, ``lag = w + 1`` with
    ``block = w`` those of the query's own block of w tokens and of the one before. Katharopoulos et
    al., arXiv 2006.16236; with decay, Sun et al., arXiv 2307.08621.

    Args:
        q_BHNf: features of the queries; H is a multiple of G, and nothing is scaled.
        k_BGNf: features of the keys. A token with zeros here is not there.
        v_BGNe: values.
        decay_BGN: natural logarithm of what each token leaves of the state before it, at most 0;
            None: all of it. Or [B, G, N, f]: of each feature's row of the state (Yang et al.,
            arXiv 2312.06635); then `lag` is 0 and `block` 1.
        state_BGfe: what the tokens before left; None: nothing.
        lag: see above.
        block: see above.
        normalize: divide by the same sum with values of 1 (`LEAST` at least). The state then has
            one column more, which is that sum's.
        bidirectional: every query sees all N keys beside the state: no decay, lag 0, block 1.

    Returns:
        ``y_BHNe`` in the dtype of q, and the state after all N keys, whatever the lag, in fp32
        (fp64 for fp64 inputs).
    """
    dtype, n = compute_dtype(q_BHNf.dtype), q_BHNf.shape[2]
    q, k, v = (x.to(dtype) for x in (q_BHNf, k_BGNf, v_BGNe))
    if normalize:
        v = with_ones(v)
    shape = (*k.shape[:2], k.shape[3], v.shape[3])
    before = q.new_zeros(shape) if state_BGfe is None else state_BGfe.to(dtype)
    c = q.new_zeros(*k.shape[:3], 1)
    if decay_BGN is not None:
        c = (decay_BGN if decay_BGN.dim() == 4 else decay_BGN[..., None]).to(dtype).cumsum(-2)
    place = torch.arange(n, device=q.device)
    seen = (place[None] <= last_seen(n, lag, block, q.device)[:, None])[..., None] | bidirectional
    apart = (c[..., :, None, :] - c[..., None, :, :]).masked_fill(~seen, 0)
    weight = torch.where(seen, apart.exp(), 0).expand(-1, -1, -1, -1, k.shape[3])
    grouped = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrnf,bgmf,bgnmf->bgrnm", grouped, k, weight)
    y = torch.einsum("bgrnm,bgme->bgrne", scores, v)
    y = y + torch.einsum("bgrnf,bgfe->bgrne", grouped * c.exp()[:, :, None], before)
    left = (c[..., -1:, :] - c).exp()
    state = c[..., -1, :].exp()[..., None] * before + (k * left).transpose(-1, -2) @ v
    y = y.flatten(1, 2)
    return (divided(y) if normalize else y).to(q_BHNf.dtype), state


def with_ones(v_BGNe: Tensor) -> Tensor:
    """The values and a column of ones, whose sum is the denominator."""
    return torch.cat([v_BGNe, torch.ones_like(v_BGNe[..., :1])], -1)


def divided(y_BHNe: Tensor) -> Tensor:
    """All columns but the last, divided by the last."""
    return y_BHNe[..., :-1] / y_BHNe[..., -1:].clamp_min(LEAST)


def undivided(dy_BHNe: Tensor, y_BHNc: Tensor) -> Tensor:
    """The gradient of `divided`: of all columns, from that of its result."""
    mass = y_BHNc[..., -1:]
    dy = dy_BHNe / mass.clamp_min(LEAST)
    dmass = -(dy * divided(y_BHNc)).sum(-1, keepdim=True)
    return torch.cat([dy, torch.where(mass > LEAST, dmass, 0)], -1)
