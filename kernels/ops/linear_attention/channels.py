"""`reattend::linear_attention` where every feature of the state decays by itself, in chunks.

Gated linear attention, Yang et al., arXiv 2312.06635: token n leaves ``exp(g_nf)`` of row f of the
state. With c the running sum of g, a pair weighs ``sum_f q_nf k_jf exp(c_nf - c_jf)``, which is no
product of scores and weights any more. Multiplying queries by ``exp(c_n)`` and keys by
``exp(-c_j)`` would overflow where much is forgotten, so pairs of a chunk are split by halves: a
query in the later half of a block and a key in the earlier one are both measured from the border
between them, and both exponents are at most 0, whatever the decays are. Letters as in `chunked.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.linear_attention.chunked import Chunks
from reattend.kernels.linear_attention.gradient import decay_gradient


class _Cut(NamedTuple):
    """The call in chunks: q [B, G, r, T, C, f], k and v [B, G, T, C, .], `sums` of log decays from
    the beginning of a chunk up to and with each token, as k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor

    @property
    def left(self) -> Tensor:
        """What is left of each key at the end of its chunk, the same shape as k."""
        return (self.sums[..., -1:, :] - self.sums).exp()

    @property
    def whole(self) -> Tensor:
        """What a chunk leaves of the state before it, [B, G, T, f, 1]."""
        return self.sums[..., -1, :].exp()[..., None]


class _Halves(NamedTuple):
    """One way to pair the later half of every block with its earlier half.

    `size`: tokens of a half, h; `now` and `ago`: what is left from the border to each token of the
    later half, and from each of the earlier half to the border, [B, G, T, C / 2h, h, f].
    """

    size: int
    now: Tensor
    ago: Tensor

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[.., C, w] -> the earlier and the later halves, [.., C / 2h, h, w] each."""
        first, second = x.unflatten(-2, (-1, 2, self.size)).unbind(-3)
        return first, second


def _chunks(n: int) -> Chunks:
    """Chunks of 64 tokens, or of the power of two that holds fewer."""
    size = min(64, 1 << (n - 1).bit_length())
    return Chunks(n, size, -(-n // size), False, 0, 1)


def _cut(chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> _Cut:
    grouped = q.unflatten(1, (k.shape[1], -1))
    return _Cut(chunks.cut(grouped), chunks.cut(k), chunks.cut(v), chunks.cut(decay).cumsum(-2))


def _halves(sums: Tensor) -> Iterator[_Halves]:
    """Every pair of different tokens of a chunk is in exactly one of these."""
    size = sums.shape[-2] // 2
    while size:
        first, second = sums.unflatten(-2, (-1, 2, size)).unbind(-3)
        border = first[..., -1:, :]
        yield _Halves(size, (second - border).exp(), (border - first).exp())
        size //= 2


def _states(x: _Cut, first_BGfe: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [B, G, T, f, e], and after the last."""
    steps, whole = (x.k * x.left).transpose(-1, -2) @ x.v, x.whole
    states = [first_BGfe]
    for t in range(steps.shape[2]):
        states.append(states[-1] * whole[:, :, t] + steps[:, :, t])
    return torch.stack(states[:-1], 2), states[-1]


def forward(
    q_BHNf: Tensor, k_BGNf: Tensor, v_BGNe: Tensor, decay_BGNf: Tensor, state_BGfe: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and the state after all keys; every query sees all keys up to its own."""
    if q_BHNf.shape[2] == 1:
        return step(q_BHNf, k_BGNf, v_BGNe, decay_BGNf, state_BGfe)
    chunks = _chunks(q_BHNf.shape[2])
    x = _cut(chunks, q_BHNf, k_BGNf, v_BGNe, decay_BGNf)
    before, after = _states(x, state_BGfe)
    y = (x.q * x.sums.exp()[:, :, None]) @ before[:, :, None]
    y = y + (x.q * x.k[:, :, None]).sum(-1, keepdim=True) * x.v[:, :, None]
    for half in _halves(x.sums):
        later = half.cut(x.q)[1] * half.now[:, :, None]
        earlier = (half.cut(x.k)[0] * half.ago)[:, :, None]
        near = (later @ earlier.transpose(-1, -2)) @ half.cut(x.v)[0][:, :, None]
        half.cut(y)[1].add_(near)
    return chunks.joined(y).flatten(1, 2), after


def step(
    q_BH1f: Tensor, k_BG1f: Tensor, v_BG1e: Tensor, decay_BG1f: Tensor, state_BGfe: Tensor
) -> tuple[Tensor, Tensor]:
    """One token."""
    left = decay_BG1f.exp().transpose(-1, -2)
    new = state_BGfe * left + k_BG1f.transpose(-1, -2) * v_BG1e
    y = q_BH1f.unflatten(1, (k_BG1f.shape[1], -1))[..., 0, :] @ new
    return y.flatten(1, 2)[:, :, None], new


def backward(
    dy_BHNe: Tensor,
    dstate_BGfe: Tensor,
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    decay_BGNf: Tensor,
    state_BGfe: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, decay and state, in closed form.

    As in `gradient.py`, and the decays' for each feature.
    """
    chunks = _chunks(q_BHNf.shape[2])
    x = _cut(chunks, q_BHNf, k_BGNf, v_BGNe, decay_BGNf)
    dy = chunks.cut(dy_BHNe.unflatten(1, (k_BGNf.shape[1], -1)))
    before, after = _states(x, state_BGfe)
    now = x.sums.exp()[:, :, None]
    # through the states
    dq = (dy @ before.transpose(-1, -2)[:, :, None]) * now
    asked = ((x.q * now).transpose(-1, -2) @ dy).sum(2)
    later, last, whole = [], dstate_BGfe, x.whole
    for t in range(chunks.count - 1, -1, -1):
        later.append(last)
        last = last * whole[:, :, t] + asked[:, :, t]
    behind = torch.stack(later[::-1], 2)
    dk = (x.v @ behind.transpose(-1, -2)) * x.left
    dv = (x.k * x.left) @ behind
    # a token and itself
    pull, score = (dy * x.v[:, :, None]).sum(-1, keepdim=True), (x.q * x.k[:, :, None]).sum(-1)
    dq = dq + pull * x.k[:, :, None]
    dk = dk + (pull * x.q).sum(2)
    dv = dv + (score[..., None] * dy).sum(2)
    for half in _halves(x.sums):
        q, dy_now = half.cut(x.q)[1] * half.now[:, :, None], half.cut(dy)[1]
        k, v = half.cut(x.k)[0] * half.ago, half.cut(x.v)[0]
        pulls = dy_now @ v.transpose(-1, -2)[:, :, None]
        scores = q @ k.transpose(-1, -2)[:, :, None]
        half.cut(dq)[1].add_((pulls @ k[:, :, None]) * half.now[:, :, None])
        half.cut(dk)[0].add_((pulls.transpose(-1, -2) @ q).sum(2) * half.ago)
        half.cut(dv)[0].add_((scores.transpose(-1, -2) @ dy_now).sum(2))
    dq, dk, dv = chunks.joined(dq).flatten(1, 2), chunks.joined(dk), chunks.joined(dv)
    tail = (dstate_BGfe * after).sum(-1)
    return dq, dk, dv, decay_gradient(q_BHNf, dq, k_BGNf, dk, tail), last
