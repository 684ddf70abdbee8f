"""Runs a selecting method over the rows of one call, and attends to what it chose.

Rows of the batch with equally many real tokens go together, cut to those tokens: padding is gone
before anything is ranked. Prefill reads blocks through `reattend::sparse_attention` where the
method knows blocks, else a mask; decoding gathers the chosen rows.

Layout letters: B batch, N new tokens, M cached tokens, H query heads, G key/value heads, d and e
key and value head widths, K keys read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.sparse_attention import BlockLayout, sparse_attention
from reattend.mixers.base import Kept
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend, own_pattern
from reattend.mixers.selecting.base import Asked, Chosen, Method, Notes, Whole
from reattend.mixers.selecting.blocks import Routes
from reattend.mixers.selecting.compile import Fixed, compiled
from reattend.mixers.selecting.memo import Memo
from reattend.mixers.selecting.routed import attend_routed
from reattend.mixers.shared_layouts import DENSE
from reattend.mixers.sparse_blocks import LEAST
from reattend.patterns.pattern import HeadPattern

#: pairs of a mask that may be formed where it is as fast as blocks
MASK = 1 << 27


@dataclass(frozen=True)
class Together:
    """Rows of the batch with equally many keys and queries, and where those are in storage.

    `keys`, `queries`: places [B, M] and [B, N] on the token axis; a number: the last ones.
    """

    rows: Tensor
    keys: Tensor | int
    queries: Tensor | int


@dataclass(frozen=True)
class RowNotes:
    """See `Notes`: some rows of a memo."""

    memo: Memo
    rows: Tensor
    batch: int

    def write(self, found: Tensor) -> None:
        """See `Notes`."""
        self.memo.write(self.rows, 0, found, self.batch)

    def read(self) -> Tensor | None:
        """See `Notes`."""
        return self.memo.read(self.rows, 1)


def attend_selected(
    q_BHNd: Tensor,
    kept: Kept,
    pattern: HeadPattern,
    core: CoreConfig,
    method: Method,
    sinks_H11: Tensor | None = None,
) -> Tensor:
    """The output [B, H, N, e] of a class of heads whose pattern has a selector; padding gives 0.

    Args:
        q_BHNd: the class' queries.
        kept: its rows.
        pattern: its pattern.
        core: of these heads alone.
        method: what chooses.
        sinks_H11: logits beside the keys'.

    Raises:
        ArgumentError: the call is traced: what is read depends on values.
    """
    if torch.compiler.is_compiling():
        raise ArgumentError(
            "a block that selects keys at run time cannot be traced",
            why="which keys it reads depends on the values of queries and keys",
            next_step="run the model as it is, or export it to ONNX, which has nodes that select",
        )
    y = q_BHNd.new_zeros(*q_BHNd.shape[:3], kept.values.shape[-1])
    for part in together(kept):
        q = _taken(q_BHNd, part.rows, part.queries)
        k, v = (_taken(x, part.rows, part.keys) for x in (kept.keys, kept.values))
        held = _summaries(kept, part, q, k, v, method)
        notes = method.remembered(part.rows)
        if kept.memo is not None:
            notes = RowNotes(kept.memo, part.rows, kept.keys.shape[0])
        out = _one(q, k, v, pattern, core, method, held, notes, sinks_H11)
        y = _put(y, out, part)
    return y


def together(kept: Kept) -> Iterator[Together]:
    """The rows of a call, sorted into groups without padding; rows without queries are left out."""
    places = [p.expand(kept.keys.shape[0], -1) for p in (kept.place_BM, kept.query_place_BN)]
    m_B, n_B = ((p >= 0).sum(-1) for p in places)
    for m, n in torch.unique(torch.stack([m_B, n_B], 1), dim=0).tolist():
        if n == 0:
            continue
        rows = ((m_B == m) & (n_B == n)).nonzero()[:, 0]
        yield Together(rows, *(_order(p[rows], c) for p, c in zip(places, (m, n), strict=True)))


def _order(place: Tensor, count: int) -> Tensor | int:
    """Where the `count` real tokens of each row are, by position; a number: the last ones."""
    if bool((place[:, place.shape[1] - count :] >= 0).all()):
        return count
    last = torch.iinfo(place.dtype).max
    return place.masked_fill(place < 0, last).argsort(dim=-1, stable=True)[:, :count]


def _taken(x_BHNd: Tensor, rows: Tensor, place: Tensor | int) -> Tensor:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):  # a view: what is cached is not copied
        x_BHNd = x_BHNd[first : last + 1]
    else:
        x_BHNd = x_BHNd.index_select(0, rows)
    if isinstance(place, int):
        return x_BHNd[:, :, x_BHNd.shape[2] - place :]
    wide = place[:, None, :, None].expand(-1, x_BHNd.shape[1], -1, x_BHNd.shape[3])
    return x_BHNd.gather(2, wide)


def _put(y: Tensor, part: Tensor, where: Together) -> Tensor:
    """`y` with the output of these rows."""
    if isinstance(where.queries, int):
        part = torch.nn.functional.pad(part, (0, 0, y.shape[2] - where.queries, 0))
    else:
        wide = where.queries[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
        part = torch.zeros_like(y[: len(part)]).scatter(2, wide, part)
    return part if len(part) == len(y) else y.index_copy(0, where.rows, part)


def _summaries(
    kept: Kept, part: Together, q_BHNd: Tensor, k_BGMd: Tensor, v_BGMe: Tensor, method: Method
) -> Tensor | None:
    """What the cache holds of whole blocks, brought up to this call."""
    if kept.memo is None or not method.block:
        return None
    m, block, batch = k_BGMd.shape[2], method.block, kept.keys.shape[0]
    first = m - q_BHNd.shape[2]
    done, whole = first // block, m // block
    begin, count = done * block, (whole - done) * block
    with torch.no_grad():
        queries = None
        if method.recalls:
            queries = kept.memo.recalled(part.rows, q_BHNd.detach(), first, begin, block, batch)
            queries = queries[:, :, :count].unflatten(2, (-1, block)) if whole > done else None
        if whole > done:
            k, v = (
                x[:, :, begin : begin + count].detach().unflatten(2, (-1, block))
                for x in (k_BGMd, v_BGMe)
            )
            all_keys = k_BGMd[:, :, : begin + count].detach()
            summary = method.summarise(Whole(k, v, queries, done, all_keys))
            kept.memo.write(part.rows, done, summary, batch)
    return kept.memo.read(part.rows, whole)


def _one(
    q: Tensor, k: Tensor, v: Tensor, pattern: HeadPattern, core: CoreConfig, method: Method,
    summaries: Tensor | None, notes: Notes | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rows without padding: queries are the last of the keys' tokens."""
    assert pattern.select is not None
    n, m = q.shape[2], k.shape[2]
    if pattern.select.acts == ("prefill" if n == 1 else "decode"):
        return attend(q, k, v, core, None, None, sinks)
    step = max(1, MASK // (q.shape[0] * core.heads * m))
    if method.pairwise and n > step:
        done = []
        for begin in range(0, n, step):
            end = m - n + min(begin + step, n)
            held = None if summaries is None else summaries[:, :, :end]
            rest = (pattern, core, method, held, notes, sinks)
            done.append(_one(q[:, :, begin : begin + step], k[:, :, :end], v[:, :, :end], *rest))
        return torch.cat(done, 2)
    with torch.no_grad():
        asked = Asked(q.detach(), k.detach(), core, summaries, notes, v.detach())
        chosen = method.choose(asked)
    if n >= LEAST and sinks is None and _routes(chosen, pattern, q, k, v):
        return attend_routed(q, k, v, chosen.map_BHRQ, chosen.each, core)
    with torch.no_grad():
        layouts = _layouts(chosen, pattern, core, q, m) if n >= LEAST and sinks is None else None
    if layouts is not None:
        return _by_blocks(q, k, v, core, layouts)
    i = torch.arange(m - n, m, device=q.device)[:, None]
    j = torch.arange(m, device=q.device)
    seen = (chosen.mask() | pattern.sees(i, j, core)) & own_pattern(core, i, j)
    seen = seen.expand(q.shape[0], -1, -1, -1)
    if n == 1:
        q, k, v, seen, core = _gathered(q, k, v, seen, core)
    return attend(q, k, v, core, seen, None, sinks)


def _routes(chosen: Chosen, pattern: HeadPattern, *given: Tensor) -> TypeGuard[Routes]:
    """Whether every query has blocks of its own and nothing beside, and no gradient is asked."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return isinstance(chosen, Routes) and chosen.each > 0 and not pattern.terms and not learns


def _layouts(
    chosen: Chosen, pattern: HeadPattern, core: CoreConfig, q: Tensor, m: int
) -> list[BlockLayout] | None:
    """One for each row of the batch; None where a mask is as fast, or blocks are not known."""
    (batch, heads, n, _), found = q.shape, []
    fixed = Fixed(pattern, core, m - n, m)
    for row in range(batch):
        made = compiled(chosen, fixed, row, heads)
        if made is None or (made[1] > DENSE and batch * heads * n * m <= MASK):
            return None
        found.append(made[0].to(q.device))
    return found


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, layouts: list[BlockLayout]
) -> Tensor:
    """Through the op, a row of the batch at a time."""
    start = torch.zeros(1, dtype=torch.long, device=q.device)
    outputs = [
        sparse_attention(
            q[b, None], k[b, None], v[b, None], *layout.tensors, start, start + k.shape[2],
            layout.block, layout.first, core.scale, core.softcap,
        )[0]
        for b, layout in enumerate(layouts)
    ]  # fmt: skip
    return torch.cat(outputs)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, seen_BH1M: Tensor, core: CoreConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, CoreConfig]:
    """The rows that one query of every head reads, side by side; as they were where that is most.

    The result has a key/value head for every query head.
    """
    count_BH = seen_BH1M.sum(-1)
    most, m = int(count_BH.max()), k.shape[2]
    if most * core.heads > DENSE * m * core.kv_heads:
        return q, k, v, seen_BH1M, core
    place = seen_BH1M.flatten(0, 2).nonzero()
    begins = count_BH.flatten().cumsum(0) - count_BH.flatten()
    number = torch.arange(len(place), device=q.device) - begins[place[:, 0]]
    order = torch.zeros(len(begins), most, dtype=torch.long, device=q.device)
    order[place[:, 0], number] = place[:, 1]
    order = order.view(*q.shape[:2], most)
    group = core.heads // core.kv_heads
    full = core.model_copy(update={"kv_heads": core.heads, "pattern": "full", "window": 0})
    shown = torch.arange(most, device=q.device) < count_BH
    return q, _rows(k, order, group), _rows(v, order, group), shown[:, :, None], full


def _rows(x_BGMd: Tensor, order_BHK: Tensor, group: int) -> Tensor:
    """Whole rows of keys or values [B, H, K, d], copied once even out of a view on its tokens."""
    width, strides = x_BGMd.shape[3], x_BGMd.stride()
    if strides[2:] != (width, 1) or strides[0] % width or strides[1] % width:
        x_BGMd = x_BGMd.contiguous()
        strides = x_BGMd.stride()
    last = sum((n - 1) * s for n, s in zip(x_BGMd.shape, strides, strict=True))
    flat = x_BGMd.as_strided((last // width + 1, width), (width, 1))
    (batch, heads, _), device = order_BHK.shape, order_BHK.device
    begin = torch.arange(batch, device=device)[:, None, None] * (strides[0] // width)
    begin = begin + torch.arange(heads, device=device)[:, None] // group * (strides[1] // width)
    return flat.index_select(0, (begin + order_BHK).flatten()).view(*order_BHK.shape, width)
