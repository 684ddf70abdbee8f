"""Query blocks sorted into batches of equal shape: what the torch implementation runs, in order.

Values of the layout and of the lengths are read here, on the host, inside the opaque op.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reattend.errors import ArgumentError

ITEMS = 256  # most query blocks of a batch
ALIKE = 4  # so many blocks must share their tiles, on average, to be batched apart


@dataclass(frozen=True)
class Batch:
    """I query blocks of one layout with equally many queries, that read equally many keys each.

    Attributes:
        layout: number of the layout.
        row_I: row of the batch.
        query_I: number of the first query.
        queries: consecutive queries of each.
        key_IK: logical positions of the keys, ascending. Keys of a block that no query sees are
            left out where all items have the same tiles.
        hidden: (first column, bools (1 or I, queries, columns)): scores to hide.
    """

    layout: int
    row_I: Tensor
    query_I: Tensor
    queries: int
    key_IK: Tensor
    hidden: list[tuple[int, Tensor]]


def _blocks(starts: Any, lengths: Any, n: int, block: int) -> tuple[Any, ...]:
    """(row, query block, offset, queries, first query) of every block that has queries."""
    found = []
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        begin, end = length - start - n, length - start
        low = max(begin, 0)
        if end <= low:
            continue
        m = np.arange(low // block, (end - 1) // block + 1)
        first = np.maximum(m * block, low)
        last = np.minimum((m + 1) * block, end)
        found.append((np.full_like(m, b), m, first - m * block, last - first, first - begin))
    if not found:
        return (np.zeros(0, np.int64),) * 5
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def _unpack(tiles: Any, block: int) -> Any:
    """Bits of tiles (..., queries), an int64 array, as bools (..., queries, block)."""
    octets = np.ascontiguousarray(tiles).astype("<i8", copy=False)[..., None].view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little")[..., :block].astype(bool)


def _together(tiles: Any, tile_W: Any, block: int) -> tuple[Any, list[tuple[int, Tensor]]]:
    """Columns (of W * block) that some query sees, and what to hide in them, for equal tiles.

    Args:
        tiles: bits of the layout's tiles, cut to the queries taken.
        tile_W: tile of each entry, or -1.
        block: tokens per block.
    """
    kept, edges = np.ones((len(tile_W), block), bool), []
    for w in np.flatnonzero(tile_W >= 0):
        seen = _unpack(tiles[tile_W[w]], block)
        kept[w] = seen.any(0)
        if not seen[:, kept[w]].all():
            edges.append((w, seen[:, kept[w]]))
    hidden = [(int(kept[:w].sum()), torch.from_numpy(~seen[None])) for w, seen in edges]
    return np.flatnonzero(kept), hidden


def _apart(tiles: Any, tile_IW: Any, block: int) -> list[tuple[int, Tensor]]:
    """What to hide where tiles differ between items; no column is left out."""
    hidden = []
    for w in np.flatnonzero((tile_IW >= 0).any(0)):
        seen = _unpack(tiles[tile_IW[:, w]], block) | (tile_IW[:, w] < 0)[:, None, None]
        hidden.append((int(w) * block, torch.from_numpy(~seen)))
    return hidden


def _groups(labels: Any) -> Iterator[Any]:
    """Indices of equal rows of an array (items, labels), at most `ITEMS` at once."""
    if len(labels) == 1:
        yield np.zeros(1, np.int64)
        return
    _, kind = np.unique(labels, axis=0, return_inverse=True)
    order = np.argsort(kind.reshape(-1), kind="stable")
    ends = np.flatnonzero(np.diff(kind.reshape(-1)[order])) + 1
    for group in np.split(order, ends):
        yield from np.split(group, range(ITEMS, len(group), ITEMS))


def schedule(
    layout: tuple[Tensor, ...], rows: tuple[Tensor, Tensor], n: int, block: int, first: int
) -> Iterator[Batch]:
    """Every query block that reads something, once, in batches of equal shape.

    Args:
        layout: row_ptr, col, tile, tiles, head_layout.
        rows: kv_start_B, kv_len_B.
        n: new tokens.
        block: tokens per block.
        first: the query block of the layout's row 0.

    Raises:
        ArgumentError: a query that is not padding has no row in the layout.
    """
    row_ptr, col, tile, tiles = (x.cpu().numpy() for x in layout[:4])
    starts, lengths = (x.tolist() for x in rows)
    row, m, offset, queries, query = _blocks(starts, lengths, n, block)
    if len(m) == 0:
        return
    at, blocks = m - first, row_ptr.shape[1] - 1
    if at.min() < 0 or at.max() >= blocks:
        raise ArgumentError(
            "reattend::sparse_attention: queries lie outside of the layout",
            why=f"they are in blocks {m.min()} to {m.max()},"
            f" the layout has {first} to {first + blocks - 1}",
            next_step="compile the pattern for this length",
        )
    for number in range(row_ptr.shape[0]):
        begin = row_ptr[number, at]
        width = row_ptr[number, at + 1] - begin
        for item in _groups(np.stack([width, offset, queries], 1)):
            entry = begin[item, None] + np.arange(width[item[0]])
            if entry.shape[1] == 0:
                continue
            low, count = int(offset[item[0]]), int(queries[item[0]])
            cut = tiles[:, low : low + count]
            alike = list(_groups(tile[entry]))
            for part in alike if len(alike) * ALIKE <= len(item) else [np.arange(len(item))]:
                tile_IW = tile[entry[part]]
                keys = (col[entry[part]].astype(np.int64)[..., None] * block) + np.arange(block)
                keys = keys.reshape(len(part), -1)
                if len(part) == 1 or (tile_IW == tile_IW[:1]).all():
                    kept, hidden = _together(cut, tile_IW[0], block)
                    keys = keys[:, kept]
                else:
                    hidden = _apart(cut, tile_IW, block)
                if keys.shape[1]:
                    yield Batch(
                        number,
                        torch.from_numpy(row[item[part]]),
                        torch.from_numpy(query[item[part]]),
                        count,
                        torch.from_numpy(keys),
                        hidden,
                    )
