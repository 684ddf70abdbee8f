"""Rows of numbers in products: a tile, or where a tile would be too wide, slices one by one.

Exact fp32 products have no matrix instruction on NVIDIA: a thread holds whole rows and columns of
their operands in registers, and a tile as wide as a latent row spills. So rows wider than a slice
are held as their addresses. A score adds up over slices, loaded where they are multiplied; a sum of
rows is a tuple with one accumulator per slice. Narrower rows, and all of 2 bytes, are tiles.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

from reattend.kernels.latent_attention.triton_span import product
from reattend.kernels.triton_tiles import load_tile


@triton.jit
def held(
    base,
    rows,
    is_row,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`load_tile`, or the rows' addresses and which of them count."""
    if BLOCK_WIDTH <= SLICE:
        found = load_tile(base, rows, is_row, WIDTH, BLOCK_WIDTH, MASKED, UPCAST)
    else:
        found = (base + rows, is_row)
    return found


@triton.jit
def _slice(x, first, WIDTH: tl.constexpr, SLICE: tl.constexpr, UPCAST: tl.constexpr):
    """Tile (rows, SLICE) of rows given as `held` gives them, from a column on."""
    column = first + tl.arange(0, SLICE)
    inside = x[1][:, None]
    if WIDTH % SLICE != 0:
        inside = inside & (column < WIDTH)[None, :]
    tile = tl.load(x[0][:, None] + column[None, :], mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def inner(
    x,
    y,
    always,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Products (rows of x, rows of y) of what is `held`; always and SPREAD: see `product`."""
    if BLOCK_WIDTH <= SLICE:
        s = product(x, y, always, PRECISION, SPREAD)
    else:
        s = tl.zeros((x[1].shape[0], y[1].shape[0]), tl.float32)
        for first in range(0, WIDTH, SLICE):
            x_tile = _slice(x, first, WIDTH, SLICE, UPCAST)
            y_tile = _slice(y, first, WIDTH, SLICE, UPCAST)
            s = tl.dot(x_tile, tl.trans(y_tile), s, input_precision=PRECISION)
    return s


@triton.jit
def nothing(
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """A sum of rows to begin with: zeros."""
    if BLOCK_WIDTH <= SLICE:
        acc = tl.zeros((ROWS, BLOCK_WIDTH), tl.float32)
    else:
        acc = ()
        for _ in tl.static_range(0, WIDTH, SLICE):
            acc = acc + (tl.zeros((ROWS, SLICE), tl.float32),)
    return acc


@triton.jit
def add_rows(
    acc,
    weights,
    x,
    begin,
    end,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
):
    """``acc + weights x`` for what is `held`; begin is less than end.

    The compiler does not know that: a branch that is always taken keeps the operands of one slice
    apart from those of the next. APART hides a product of tiles from the next one in the same way:
    else the sum changes layout between the two.
    """
    if BLOCK_WIDTH > SLICE:
        found = ()
        for first in tl.static_range(0, WIDTH, SLICE):
            part = acc[first // SLICE]
            if end - begin > first - WIDTH:  # never the condition of another slice
                tile = _slice(x, first, WIDTH, SLICE, UPCAST)
                part = tl.dot(weights, tile, part, input_precision=PRECISION)
            found = found + (part,)
    else:
        if APART:
            if begin < end:
                found = tl.dot(weights, x, acc, input_precision=PRECISION)
            else:
                found = tl.dot(weights, x, acc, input_precision=PRECISION)
        else:
            found = tl.dot(weights, x, acc, input_precision=PRECISION)
    return found


@triton.jit
def _store(to, rows, first, tile, is_row, is_kept, scale, WIDTH: tl.constexpr):
    column = first + tl.arange(0, tile.shape[1])
    out = tile * scale
    if is_kept is not None:
        out = tl.where(is_kept[:, None], out, 0.0)
    out = out.to(to.dtype.element_ty)
    at = to + rows[:, None] * WIDTH + column[None, :]
    tl.store(at, out, mask=is_row[:, None] & (column < WIDTH)[None, :])


@triton.jit
def store_rows(
    to,
    rows,
    acc,
    is_row,
    is_kept,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Write a sum of rows, scaled, to a contiguous tensor; 0 unless kept (None: all are)."""
    if BLOCK_WIDTH <= SLICE:
        _store(to, rows, 0, acc, is_row, is_kept, scale, WIDTH)
    else:
        for first in tl.static_range(0, WIDTH, SLICE):
            _store(to, rows, first, acc[first // SLICE], is_row, is_kept, scale, WIDTH)
