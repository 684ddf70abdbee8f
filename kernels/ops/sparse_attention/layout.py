"""The one form in which every sparse pattern reaches the op: block-CSR with tiles at the edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.sparse_attention.mask import entry_rows, pack, unpack, visible_pairs

BLOCKS = (16, 32, 64)


def _require(good: Any, what: str, why: str) -> None:
    if not bool(good):
        raise ArgumentError(f"block layout: {what}", why=why)


@dataclass(frozen=True)
class BlockLayout:
    """Which key blocks each query block reads: block-CSR, exact at token level through tiles.

    Positions are logical: token 0 is the first real token of a row of the batch, whatever padding
    stands before it. Causality is part of the layout, so patterns that look ahead are no special
    case. L layouts of P query blocks; heads choose among them.

    Attributes:
        block: tokens per block: 16, 32 or 64.
        first: the query block that row 0 stands for. Decode and later chunks need the last rows
            only.
        row_ptr: int32 (L, P + 1). Query block m of layout l reads entries
            ``row_ptr[l, m - first] .. row_ptr[l, m - first + 1]``; layouts follow each other.
        col: int32 (nnz,), key block of each entry, ascending inside a row.
        tile: int32 (nnz,), -1 where every pair is visible, else a row of `tiles`.
        tiles: int64 (T, block). Bit j of ``tiles[t, i]``: query i of its block sees key j of its
            block.
        head_layout: int32 (H,), the layout of each query head.
    """

    block: int
    first: int
    row_ptr: Tensor
    col: Tensor
    tile: Tensor
    tiles: Tensor
    head_layout: Tensor

    def __post_init__(self) -> None:
        check_layout(
            self.row_ptr, self.col, self.tile, self.tiles, self.head_layout, self.block, self.first
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """row_ptr, col, tile, tiles and head_layout: arguments of the op, in order."""
        return self.row_ptr, self.col, self.tile, self.tiles, self.head_layout

    @classmethod
    def from_mask(
        cls, mask_LNM: Tensor, head_layout: Tensor, block: int = 64, *, first: int = 0
    ) -> BlockLayout:
        """Compile any mask exactly; equal tiles are stored once.

        Args:
            mask_LNM: bool, True where query ``first * block + n`` sees key m; logical positions.
            head_layout: int (H,), row of the mask each query head uses.
            block: tokens per block.
            first: the query block where the rows of the mask begin.

        Raises:
            ArgumentError: the mask is not a 3-D bool tensor, or the block size is not one of 16,
                32 and 64.
        """
        _require(block in BLOCKS, f"the block must be one of {BLOCKS}", f"it is {block}")
        _require(
            mask_LNM.dim() == 3 and mask_LNM.dtype == torch.bool,
            "a mask must be a 3-D bool tensor (layouts, queries, keys)",
            f"it has {mask_LNM.dim()} dimensions and dtype {mask_LNM.dtype}",
        )
        layouts, n, m = mask_LNM.shape
        mask = torch.nn.functional.pad(mask_LNM, (0, -m % block, 0, -n % block))
        grid = mask.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)
        rows = grid.shape[1]
        place = grid.any(-1).any(-1).nonzero()  # sorted by layout, row, column
        pairs = grid[place[:, 0], place[:, 1], place[:, 2]]
        partial = ~pairs.flatten(1).all(1)
        tile = torch.full((len(place),), -1, dtype=torch.int32, device=mask.device)
        tiles, number = torch.unique(pack(pairs[partial]), dim=0, return_inverse=True)
        tile[partial] = number.int()
        counts = torch.bincount(place[:, 0] * rows + place[:, 1], minlength=layouts * rows)
        ends = counts.cumsum(0).view(layouts, rows)
        begins = torch.cat([ends.new_zeros(1), ends[:-1, -1]])[:, None]
        return cls(
            block,
            first,
            torch.cat([begins, ends], 1).int(),
            place[:, 2].int(),
            tile,
            tiles,
            head_layout.to(mask.device, torch.int32),
        ).validate()

    def to_mask(self, n: int, m: int) -> Tensor:
        """The mask (L, n, m) again: queries ``first * block + i``, keys from logical position 0."""
        device = self.col.device
        pos_N = self.first * self.block + torch.arange(n, device=device)
        key_M = torch.arange(m, device=device)
        args = (*self.tensors[:4], self.block, self.first)
        return visible_pairs(*args, pos_N[None], key_M[None])[0]

    def pairs(self) -> Tensor:
        """Number of visible (query, key) pairs of each layout, int64 (L,)."""
        return self.pairs_before()[:: self.row_ptr.shape[1] - 1].diff()

    def pairs_before(self) -> Tensor:
        """Visible pairs before each row, layout after layout, and of all: int64 (L * P + 1,)."""
        hidden = self.block**2 - unpack(self.tiles).flatten(1).sum(1)
        edge = (self.tile >= 0).nonzero()[:, 0]
        hidden = hidden[self.tile[edge].long()].cumsum(0)
        rows = torch.cat([self.row_ptr[:, :-1].flatten(), self.row_ptr[-1, -1:]]).long()
        before = torch.searchsorted(edge, rows)  # edges before each row
        return rows * self.block**2 - torch.cat([hidden.new_zeros(1), hidden])[before]

    def density(self, n: int | None = None, m: int | None = None) -> float:
        """Visible pairs over all n * m pairs, mean over heads (causal attention: about 0.5).

        Args:
            n: number of queries; all rows of the layout when None.
            m: number of keys; as far as the last query when None.
        """
        rows = self.row_ptr.shape[1] - 1
        n = rows * self.block if n is None else n
        m = self.first * self.block + n if m is None else m
        return float(self.pairs()[self.head_layout.long()].double().mean()) / max(n * m, 1)

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device."""
        names = ("row_ptr", "col", "tile", "tiles", "head_layout")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def validate(self) -> BlockLayout:
        """Check the values too, not only shapes and dtypes; returns itself.

        A GPU is waited for. What this accepts, the kernels read safely.

        Raises:
            ArgumentError: names the tensor and the entry that breaks the layout.
        """
        layouts, entries = self.row_ptr.shape[0], self.col.shape[0]
        flat = self.row_ptr.flatten()
        _require((flat[1:] >= flat[:-1]).all(), "row_ptr must not decrease", "it does somewhere")
        _require(
            (self.row_ptr[1:, 0] == self.row_ptr[:-1, -1]).all(),
            "each layout must begin where the one before ends",
            "row_ptr[l + 1, 0] differs from row_ptr[l, P]",
        )
        found = (int(flat[0]), int(flat[-1]))
        _require(found == (0, entries), f"row_ptr must go from 0 to {entries}", f"it is {found}")
        row = entry_rows(self.row_ptr, entries)
        same = row[1:] == row[:-1]
        _require(
            (self.col >= 0).all() and (~same | (self.col[1:] > self.col[:-1])).all(),
            "col must be at least 0 and ascend inside a row",
            "it does not somewhere, or a row has a key block twice",
        )
        count = self.tiles.shape[0]
        _require(
            ((self.tile >= -1) & (self.tile < count)).all(),
            f"tile must be -1 or a row of tiles (there are {count})",
            "an entry is neither",
        )
        if self.block < 64:
            limit = 1 << self.block
            _require(
                ((self.tiles >= 0) & (self.tiles < limit)).all(),
                f"tiles have {self.block} bits",
                "a higher bit is set",
            )
        _require(
            ((self.head_layout >= 0) & (self.head_layout < layouts)).all(),
            f"head_layout must name one of the {layouts} layouts",
            "a head names another",
        )
        return self


def check_layout(
    row_ptr: Tensor,
    col: Tensor,
    tile: Tensor,
    tiles: Tensor,
    head_layout: Tensor,
    block: int,
    first: Any,
) -> None:
    """Shapes, dtypes and devices of a layout's tensors; reads no value.

    Raises:
        ArgumentError: names the tensor.
    """
    _require(block in BLOCKS, f"the block must be one of {BLOCKS}", f"it is {block}")
    if isinstance(first, int):
        _require(first >= 0, "first must not be negative", f"it is {first}")
    for name, x, dim, dtype in (
        ("row_ptr", row_ptr, 2, torch.int32),
        ("col", col, 1, torch.int32),
        ("tile", tile, 1, torch.int32),
        ("tiles", tiles, 2, torch.int64),
        ("head_layout", head_layout, 1, torch.int32),
    ):
        _require(
            x.dim() == dim and x.dtype == dtype,
            f"{name} must be a {dim}-D {dtype} tensor",
            f"it has {x.dim()} dimensions and dtype {x.dtype}",
        )
        _require(
            x.device == row_ptr.device,
            "its tensors must be on one device",
            f"{name} is on {x.device}, row_ptr on {row_ptr.device}",
        )
    _require(
        row_ptr.shape[0] >= 1 and row_ptr.shape[1] >= 2,
        "row_ptr must have a layout and a query block at least",
        f"it is {tuple(row_ptr.shape)}",
    )
    _require(
        tiles.shape[1] == block,
        "tiles must have one number per query of a block",
        f"{tiles.shape[1]} numbers, blocks of {block}",
    )
