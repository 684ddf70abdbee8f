"""Flow attention: weights between tokens are flows, conserved at queries and at keys.

Wu et al., "Flowformer", arXiv 2202.06258. In blocks that see everything, with phi the features and
sums over all real tokens,

    I_n = phi(q_n) . sum_j phi(k_j)               what flows into query n
    O_j = phi(k_j) . sum_n phi(q_n)               what flows out of key j
    I'_n = phi(q_n) . sum_j phi(k_j) / O_j        after every key gives 1
    O'_j = phi(k_j) . sum_n phi(q_n) / I_n        after every query takes 1
    y_n = sigmoid(I'_n) / I_n  phi(q_n) . sum_j phi(k_j) (v_j M softmax_j(O'_j))^T

M keys: as many as queries, so their ratio in the paper is 1. In causal blocks, as the released code
has it, every sum at token n, counted from 1, ends with n, and means stand for sums:

    I_n = phi(q_n) . mean_(j <= n) phi(k_j)       O_n = phi(k_n) . mean_(m <= n) phi(q_m)
    I'_n = phi(q_n) . mean_(j <= n) phi(k_j) / O_j
    O'_n = phi(k_n) . mean_(m <= n) phi(q_m) / I_m
    c_n = n exp(O'_n) / sum_(j <= n) exp(O'_j)    what key n competes with, for good
    y_n = sigmoid(I'_n) / (n I_n)  phi(q_n) . sum_(j <= n) phi(k_j) (c_j v_j)^T

so every token changes four sums of features, one number and the state, whatever comes later. In
both O' is cut to [-1, 1] and sums are at least `LEAST`, as in the released code.

Layout letters: B batch, H heads, N tokens, f features, e value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.linear_attention import linear_attention
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
    y: Tensor = linear_attention(q / into, k, v_BHNe * share, bidirectional=True)[0]
    return y * taken.sigmoid()


def _total(a_BHNf: Tensor, b_BHNf: Tensor) -> Tensor:
    """``a_n . sum_j b_j``, [B, H, N, 1]."""
    total: Tensor = a_BHNf @ b_BHNf.sum(2)[..., None]
    return total


class Flows(NamedTuple):
    """What earlier tokens leave beside the state: sums of keys, queries, keys / O and queries / I
    [B, H, 4, f], and of exp(O') [B, H, 1, 1].
    """

    sums_BH4f: Tensor
    race_BH11: Tensor

    @staticmethod
    def none(f_BHNf: Tensor) -> Flows:
        """Of no token."""
        (b, heads, _, features), new = f_BHNf.shape, f_BHNf.new_zeros
        return Flows(new(b, heads, 4, features), new(b, heads, 1, 1))


class Flowing(NamedTuple):
    """What linear attention is given, and what its sums are multiplied with; the flows after."""

    q_BHNf: Tensor
    k_BHNf: Tensor
    v_BHNe: Tensor
    gate_BHN1: Tensor
    after: Flows


def flowing(
    f_BHNf: Tensor, k_BHNf: Tensor, v_BHNe: Tensor, place_BN: Tensor, before: Flows
) -> Flowing:
    """The causal form, as the arguments of `reattend::linear_attention`.

    Args:
        f_BHNf, k_BHNf: features of queries and keys, not negative.
        v_BHNe: values.
        place_BN: of each token among the real ones, from 0; negative for padding, which neither
            gives nor takes.
        before: of earlier tokens.
    """
    real = (place_BN >= 0)[:, None, :, None].to(f_BHNf.dtype)
    count = (place_BN[:, None, :, None] + 1).clamp_min(1).to(f_BHNf.dtype)
    q, k = f_BHNf * real, k_BHNf * real
    sums = before.sums_BH4f
    keys, queries = sums[:, :, :1] + k.cumsum(2), sums[:, :, 1:2] + q.cumsum(2)
    into, out = (
        ((a * b).sum(-1, keepdim=True) / count).clamp_min(LEAST)
        for a, b in ((q, keys), (k, queries))
    )
    given, taken = sums[:, :, 2:3] + (k / out).cumsum(2), sums[:, :, 3:] + (q / into).cumsum(2)
    gate = ((q * given).sum(-1, keepdim=True) / count).sigmoid()
    rival = ((k * taken).sum(-1, keepdim=True) / count).clamp(-1.0, 1.0).exp() * real
    race = before.race_BH11 + rival.cumsum(2)
    share = count * rival / race.clamp_min(LEAST)
    last = torch.cat([x[:, :, -1:] for x in (keys, queries, given, taken)], 2)
    return Flowing(q, k, v_BHNe * share, gate / (count * into), Flows(last, race[:, :, -1:]))
