"""Flow attention: weights between tokens are flows, conserved at queries and at keys.

Wu et al., "Flowformer", arXiv 2202.06258, for blocks that see everything. With phi the features
and sums over all real tokens,

    I_n = phi(q_n) . sum_j phi(k_j)               what flows into query n
    O_j = phi(k_j) . sum_n phi(q_n)               what flows out of key j
    I'_n = phi(q_n) . sum_j phi(k_j) / O_j        after every key gives 1
    O'_j = phi(k_j) . sum_n phi(q_n) / I_n        after every query takes 1
    y_n = sigmoid(I'_n) / I_n  phi(q_n) . sum_j phi(k_j) (v_j M softmax_j(O'_j))^T

M keys: as many as queries, so their ratio in the paper is 1. As in the released code O' is cut to
[-1, 1], and sums are at least `LEAST`.

Layout letters: B batch, H heads, N tokens, f features, e value width.
"""

from __future__ import annotations

from torch import Tensor

from reattend.kernels.linear_attention.reference import LEAST


def flow(f_BHNf: Tensor, k_BHNf: Tensor, v_BHNe: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Outputs [B, H, N, e]; padding neither gives nor takes.

    Args:
        f_BHNf, k_BHNf: features of queries and keys, not negative.
        v_BHNe: values.
        valid_BN: which tokens are real; None: all.
    """
    q, k = f_BHNf, k_BHNf
    count: int | Tensor = q.shape[2]
    if valid_BN is not None:
        real = valid_BN[:, None, :, None]
        q, k, count = q * real, k * real, valid_BN.sum(-1)[:, None, None, None]
    into = _total(q, k).clamp_min(LEAST)
    out = _total(k, q).clamp_min(LEAST)
    taken = _total(q, k / out)
    given = _total(k, q / into).clamp(-1.0, 1.0)
    if valid_BN is not None:
        given = given.masked_fill(~real, float("-inf"))
    share = given.softmax(2) * count
    sums = k.transpose(-1, -2) @ (v_BHNe * share)
    y: Tensor = (q / into) @ sums * taken.sigmoid()
    return y


def _total(a_BHNf: Tensor, b_BHNf: Tensor) -> Tensor:
    """``a_n . sum_j b_j``, [B, H, N, 1]."""
    total: Tensor = a_BHNf @ b_BHNf.sum(2)[..., None]
    return total
