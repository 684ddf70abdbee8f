"""What a block layout means, token by token: the dense mask, from tensors and traceable."""

from __future__ import annotations

import torch
from torch import Tensor


def entry_rows(row_ptr: Tensor, entries: int) -> Tensor:
    """Row (layout * P + query block) of each entry of a block layout, int64."""
    begins = row_ptr[:, :-1].flatten().contiguous()
    number = torch.arange(entries, dtype=begins.dtype, device=begins.device)
    return torch.searchsorted(begins, number, right=True) - 1


def unpack(tiles: Tensor) -> Tensor:
    """Bits of tiles (..., block) as bools (..., block queries, block keys)."""
    shift = torch.arange(tiles.shape[-1], device=tiles.device)
    return (tiles[..., None] >> shift) & 1 != 0


def pack(pairs: Tensor) -> Tensor:
    """Bools (..., block queries, block keys) as bits (..., block), int64; inverse of `unpack`."""
    shift = torch.arange(pairs.shape[-1], device=pairs.device)
    return (pairs.long() << shift).sum(-1)


def visible_pairs(
    row_ptr: Tensor,
    col: Tensor,
    tile: Tensor,
    tiles: Tensor,
    block: int,
    first: int,
    pos_BN: Tensor,
    key_BM: Tensor,
) -> Tensor:
    """Which query sees which key in each layout.

    Args:
        row_ptr: as in `BlockLayout`, like the next five.
        col: key block of each entry.
        tile: tile of each entry, or -1.
        tiles: bits of the tiles.
        block: tokens per block.
        first: the query block of row 0.
        pos_BN: logical position of each query; negative ones see nothing, and so do those whose
            block is not among the layout's rows.
        key_BM: logical position of each key; negative ones are not seen.

    Returns:
        Bool tensor (B, L, N, M).
    """
    layouts, blocks = row_ptr.shape[0], row_ptr.shape[1] - 1
    columns = (key_BM.shape[1] + block - 1) // block
    ends = tiles.new_tensor([[-1], [0]]).expand(2, block)  # sees all, sees nothing
    bits = torch.cat([tiles, ends])
    everything, nothing = tiles.shape[0], tiles.shape[0] + 1
    # number of the tile at (layout, query block, key block); columns past the cache are one more
    cell = torch.full((layouts * blocks, columns + 1), nothing, device=col.device)
    place = (entry_rows(row_ptr, col.shape[0]), col.long().clamp(max=columns))
    cell = cell.index_put(place, torch.where(tile < 0, everything, tile.long()))
    cell = cell.view(layouts, blocks, columns + 1)
    row_BN = torch.div(pos_BN, block, rounding_mode="floor") - first
    is_row_BN = (row_BN >= 0) & (row_BN < blocks)
    cell_LBNC = cell[:, row_BN.clamp(0, blocks - 1).long()]
    bits_LBNC = bits[cell_LBNC, (pos_BN % block)[..., None].long()]
    key_block_BM = torch.div(key_BM, block, rounding_mode="floor").clamp(0, columns).long()
    index = key_block_BM[None, :, None].expand(layouts, -1, pos_BN.shape[1], -1)
    bits_LBNM = bits_LBNC.gather(-1, index)
    seen = (bits_LBNM >> (key_BM % block)[None, :, None]) & 1 != 0
    seen = seen & is_row_BN[None, :, :, None] & (key_BM >= 0)[None, :, None]
    return seen.transpose(0, 1)
