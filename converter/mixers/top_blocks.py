"""Exact attention to the best key blocks of every query block, by products of their means.

The choice is SLA's (Zhang et al., arXiv 2509.24006). Subtracting the mean key, as its paper writes,
moves all scores of a query block by one number and chooses the same blocks.

Padding is moved behind the real tokens first, so blocks are counted from the first real one. Long
calls go through `reattend::sparse_attention`; others, and traced ones, gather the blocks.

Layout letters: B batch, H query heads, G KV heads, N tokens, P blocks of c tokens, T blocks that
are read, d and e key and value widths, w any width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.kernels.sparse_attention import BlockLayout, sparse_attention
from reattend.kernels.sparse_attention.layout import BLOCKS
from reattend.mixers.everywhere_config import PARTS, EverywhereConfig
from reattend.mixers.features import widened
from reattend.mixers.sparse_blocks import LEAST


class Tokens(NamedTuple):
    """Where the real tokens of each row are.

    `order_BN`: of every place the token that stands there, real ones first; `place_BN`: the other
    way round; `count_B`: how many are real. None: all, in their order.
    """

    order_BN: Tensor | None
    place_BN: Tensor | None
    count_B: Tensor | None

    def sorted(self, x_BhNw: Tensor) -> Tensor:
        """Real tokens first."""
        return _moved(x_BhNw, self.order_BN)

    def back(self, x_BhNw: Tensor) -> Tensor:
        """As they were given."""
        return _moved(x_BhNw, self.place_BN)


class Best(NamedTuple):
    """What each query block reads: `block_BHPT`, best first, and which of them count."""

    block_BHPT: Tensor
    taken_B1PT: Tensor | None


def real_first(valid_BN: Tensor | None) -> Tokens:
    """Where real tokens are, as a mask says."""
    if valid_BN is None:
        return Tokens(None, None, None)
    real = valid_BN.long()
    count_B = real.sum(-1)
    before = real.cumsum(-1) - real
    other = (1 - real).cumsum(-1) - 1 + count_B[:, None]
    place = torch.where(valid_BN, before, other)
    token = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return Tokens(torch.zeros_like(place).scatter(1, place, token), place, count_B)


def blocks(x_BhNw: Tensor, size: int) -> Tensor:
    """[B, h, P, c, w], the last block filled up with zeros."""
    n = x_BhNw.shape[2]
    count = (n + size - 1) // size
    cut: Tensor = F.pad(x_BhNw, (0, 0, 0, count * size - n)).unflatten(2, (count, size))
    return cut


def best(q_BHNd: Tensor, k_BGNd: Tensor, c: EverywhereConfig, count_B: Tensor | None) -> Best:
    """The blocks that each query block attends to. Tokens are sorted."""
    size, n = c.sparse_block, q_BHNd.shape[2]
    means = []
    for x in (q_BHNd, k_BGNd):
        if count_B is not None:
            x = x * (torch.arange(n, device=x.device) < count_B[:, None])[:, None, :, None]
        cut = blocks(x.detach(), size)
        means.append(cut.sum(3) / _held(cut.shape[2], size, n, count_B, x))
    q, k = means
    scores = (q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2)[:, :, None]).flatten(1, 2)
    many = k.shape[2]
    if count_B is None:
        return Best(scores.topk(c.top(many), -1).indices, None)
    number = torch.arange(many, device=q.device)
    own_B = (count_B + size - 1) // size
    scores = scores.masked_fill(number >= own_B[:, None, None, None], float("-inf"))
    found = scores.topk(c.top(many), -1).indices
    most_B = (own_B * round(c.sparse_top * PARTS) + PARTS - 1) // PARTS
    return Best(found, number[: found.shape[-1]] < most_B[:, None, None, None])


def _held(count: int, size: int, n: int, count_B: Tensor | None, like: Tensor) -> Tensor:
    """Real tokens of every block, 1 at least, [B or 1, 1, P, 1]."""
    begin = torch.arange(count, device=like.device) * size
    end = torch.tensor([n], device=like.device) if count_B is None else count_B
    held = (end[:, None] - begin).clamp(1, size)
    return held[:, None, :, None].to(like.dtype)


def gathered(x_BHPcw: Tensor, found: Best) -> Tensor:
    """The rows of the blocks that each query block reads, [B, H, P, T c, w]."""
    b, h, p = x_BHPcw.shape[:3]
    first = torch.arange(b * h, device=x_BHPcw.device).view(b, h, 1, 1) * p
    rows = x_BHPcw.flatten(0, 2).index_select(0, (first + found.block_BHPT).flatten())
    return rows.view(*found.block_BHPT.shape, *rows.shape[1:]).flatten(3, 4)


def hidden(found: Best, size: int, n: int, count_B: Tensor | None) -> Tensor:
    """Which gathered keys are none, [B, H, P, 1, T c]."""
    slot = torch.arange(size, device=found.block_BHPT.device)
    place = found.block_BHPT[..., None] * size + slot
    gone = place >= (n if count_B is None else count_B[:, None, None, None, None])
    if found.taken_B1PT is not None:
        gone = gone | ~found.taken_B1PT[..., None]
    return gone.flatten(3)[:, :, :, None]


def attend_best(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, c: EverywhereConfig, scale: float,
    valid_BN: Tensor | None,
) -> Tensor:  # fmt: skip
    """Softmax attention [B, H, N, e] of every query block to its best key blocks."""
    n, size, tracing = q_BHNd.shape[2], c.sparse_block, torch.compiler.is_compiling()
    if not tracing and valid_BN is None and size in BLOCKS and n >= LEAST:
        return _through_op(q_BHNd, k_BGNd, v_BGNe, c, scale)
    tokens = real_first(valid_BN)
    q, k, v = (tokens.sorted(x) for x in (q_BHNd, k_BGNd, v_BGNe))
    found = best(q, k, c, tokens.count_B)
    repeat = q.shape[1] // k.shape[1]
    near = [gathered(blocks(x.repeat_interleave(repeat, 1), size), found) for x in (k, v)]
    scores = blocks(q, size) @ near[0].transpose(-1, -2) * scale
    # not -inf: a row without any real token stays finite
    wide = widened(scores)
    wide = wide.masked_fill(hidden(found, size, n, tokens.count_B), torch.finfo(wide.dtype).min)
    y = (wide.softmax(-1).to(v.dtype) @ near[1]).flatten(2, 3)[:, :, :n]
    return tokens.back(y)


def _through_op(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, c: EverywhereConfig, scale: float
) -> Tensor:
    """The same through block-CSR: the heads of all rows of the batch side by side."""
    (b, h, n, _), device = q_BHNd.shape, q_BHNd.device
    col = best(q_BHNd, k_BGNd, c, None).block_BHPT.sort(-1).values.int()
    many, each = col.shape[2:]
    ends = torch.arange(many + 1, device=device) * each
    begins = torch.arange(b * h, device=device)[:, None] * many * each
    layout = BlockLayout(
        c.sparse_block, 0, (begins + ends).int(), col.flatten(),
        torch.full_like(col.flatten(), -1),
        torch.zeros(0, c.sparse_block, dtype=torch.int64, device=device),
        torch.arange(b * h, dtype=torch.int32, device=device),
    )  # fmt: skip
    start = torch.zeros(1, dtype=torch.long, device=device)
    y: Tensor = sparse_attention(
        *(x.flatten(0, 1)[None] for x in (q_BHNd, k_BGNd, v_BGNe)),
        *layout.tensors, start, start + n, layout.block, layout.first, scale, 0.0,
    )[0]  # fmt: skip
    made: Tensor = y[0].unflatten(0, (b, h))
    return made


def _moved(x_BhNw: Tensor, index_BN: Tensor | None) -> Tensor:
    if index_BN is None:
        return x_BhNw
    return x_BhNw.gather(2, index_BN[:, None, :, None].expand_as(x_BhNw))
