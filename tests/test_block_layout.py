"""`BlockLayout`: any mask compiles, the mask comes back, wrong layouts are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_layouts import PATTERNS, mask_of
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.kernels.sparse_attention import BlockLayout

HEADS = torch.tensor([0, 0, 1, 2], dtype=torch.int32)


def spelled(layout: BlockLayout, n: int, m: int) -> Tensor:
    """The mask of a layout by its definition, entry by entry and bit by bit."""
    mask = torch.zeros(layout.row_ptr.shape[0], n, m, dtype=torch.bool)
    size = layout.block
    for number, row_ptr in enumerate(layout.row_ptr.tolist()):
        for row in range(len(row_ptr) - 1):
            for entry in range(row_ptr[row], row_ptr[row + 1]):
                col, tile = int(layout.col[entry]), int(layout.tile[entry])
                bits = [-1] * size if tile < 0 else layout.tiles[tile].tolist()
                for i in range(size):
                    for j in range(size):
                        query, key = row * size + i, col * size + j
                        if query < n and key < m:
                            mask[number, query, key] = bool(bits[i] >> j & 1)
    return mask


@pytest.mark.parametrize("n", [1, 61, 64])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_come_back(pattern: str, block: int, n: int) -> None:
    mask = mask_of(pattern, n)
    layout = BlockLayout.from_mask(mask, HEADS, block)
    assert torch.equal(layout.to_mask(n, n), mask)
    assert not layout.to_mask(n + 70, n + 70)[:, n:].any()
    if block == 16 and n == 61:
        assert torch.equal(spelled(layout, n, n), mask)


def test_bit_63_is_a_bit_like_the_others() -> None:
    mask = torch.eye(64, dtype=torch.bool)[None]
    layout = BlockLayout.from_mask(mask, HEADS * 0, 64)
    assert layout.tiles.tolist() == [[1 << i if i < 63 else -(1 << 63) for i in range(64)]]
    assert torch.equal(layout.to_mask(64, 64), mask)


def test_rows_from_first_on() -> None:
    mask = mask_of("sinks-and-window", 61)
    layout = BlockLayout.from_mask(mask[:, 32:], HEADS, 16, first=2)
    assert layout.row_ptr.shape == (3, 3)
    assert torch.equal(layout.to_mask(29, 61), mask[:, 32:])


def test_equal_tiles_are_stored_once_and_whole_blocks_not_at_all() -> None:
    mask = mask_of("causal", 128)[2:]  # plain causal
    layout = BlockLayout.from_mask(mask, HEADS * 0, 32)
    assert layout.row_ptr.tolist() == [[0, 1, 3, 6, 10]]
    assert layout.col.tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert layout.tile.tolist() == [0, -1, 0, -1, -1, 0, -1, -1, -1, 0]
    assert len(layout.tiles) == 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_density_counts_pairs(pattern: str) -> None:
    mask = mask_of(pattern, 61)
    layout = BlockLayout.from_mask(mask, HEADS, 16)
    assert layout.pairs().tolist() == mask.sum((1, 2)).tolist()
    want = mask[HEADS.long()].double().mean()
    assert layout.density(61, 61) == pytest.approx(float(want), abs=1e-12)


def test_density_of_whole_causal_attention() -> None:
    layout = BlockLayout.from_mask(mask_of("causal", 64)[2:], HEADS * 0, 16)
    assert layout.density() == pytest.approx(65 / 128)
    last = BlockLayout.from_mask(mask_of("causal", 64)[2:, 48:], HEADS * 0, 16, first=3)
    assert last.density() == pytest.approx((49 + 64) / 2 / 64)


def test_to_moves_every_tensor() -> None:
    layout = BlockLayout.from_mask(mask_of("causal", 20), HEADS, 16).to("meta")
    assert {x.device.type for x in layout.tensors} == {"meta"}


GOOD = BlockLayout.from_mask(mask_of("causal", 40), HEADS, 16)


def changed(x: Tensor, place: Any, value: int) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 8}, "one of"),
        ({"first": -1}, "first must not be negative"),
        ({"col": GOOD.col.long()}, "col must be a 1-D torch.int32"),
        ({"head_layout": HEADS[None]}, "head_layout must be a 1-D"),
        ({"tiles": GOOD.tiles[:, 1:]}, "one number per query"),
        ({"row_ptr": GOOD.row_ptr[:, :1]}, "a query block at least"),
        ({"tile": GOOD.tile.to("meta")}, "on one device"),
        ({"row_ptr": changed(GOOD.row_ptr, (0, 1), 9)}, "must not decrease"),
        ({"row_ptr": GOOD.row_ptr + 1}, "must go from 0"),
        ({"row_ptr": GOOD.row_ptr.flip(0)}, "must not decrease"),
        ({"row_ptr": changed(GOOD.row_ptr, (1, 0), int(GOOD.row_ptr[1, 1]))}, "one before ends"),
        ({"col": changed(GOOD.col, 0, -1)}, "ascend inside a row"),
        ({"col": changed(GOOD.col, 1, 5)}, "ascend inside a row"),
        ({"tile": changed(GOOD.tile, 0, 99)}, "a row of tiles"),
        ({"tiles": changed(GOOD.tiles, (0, 0), 1 << 16)}, "16 bits"),
        ({"head_layout": HEADS + 1}, "one of the 3 layouts"),
    ],
)
def test_wrong_layouts_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(GOOD, **change).validate()


@pytest.mark.parametrize("mask", [torch.ones(4, 4, dtype=torch.bool), torch.ones(1, 4, 4)])
def test_only_masks_compile(mask: Tensor) -> None:
    with pytest.raises(ArgumentError, match="3-D bool"):
        BlockLayout.from_mask(mask, HEADS * 0, 16)
