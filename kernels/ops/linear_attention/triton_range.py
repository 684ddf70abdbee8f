"""Products with sums that fp16 might not hold: divided by powers of two before they are rounded.

Of fp32 and bf16, whose range is the sums' own, they are products as ever. A power of two changes no
digit, so the rounding is that of the type. Letters as in `triton_state.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# (the arguments are Triton values; their types are given at compile time)

from __future__ import annotations

import triton
import triton.language as tl

# fields of an exponent: the least and the greatest that are used, and where the largest number of
# a line is put (2^14; fp16 ends below 2^16)
LEAST_FIELD = tl.constexpr(27)
MOST_FIELD = tl.constexpr(254)
TOP = tl.constexpr(14)


@triton.jit
def powers(x, AXIS: tl.constexpr):
    """A power of two for each line of x, and what is left of it when it is divided by that.

    What a line's largest number leaves is in [2^14, 2^15); infinities and NaN stay what they are.
    """
    field = (tl.max(tl.abs(x), AXIS).to(tl.int32, bitcast=True) >> 23) & 255
    field = tl.minimum(tl.maximum(field, LEAST_FIELD), MOST_FIELD) - TOP
    inverse = ((254 - field) << 23).to(tl.float32, bitcast=True)
    power = (field << 23).to(tl.float32, bitcast=True)
    return power, inverse


@triton.jit
def dot_left(x, tile, acc, PRECISION: tl.constexpr):
    """``acc + x tile``, x in fp32."""
    if tile.dtype == tl.float16:
        power, inverse = powers(x, 1)
        small = (x * inverse[:, None]).to(tl.float16)
        acc += tl.dot(small, tile, input_precision=PRECISION) * power[:, None]
    else:
        acc = tl.dot(x.to(tile.dtype), tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dot_right(tile, x, acc, PRECISION: tl.constexpr):
    """``acc + tile x``, x in fp32 or as it is stored."""
    if tile.dtype == tl.float16:
        power, inverse = powers(x, 0)
        small = (x * inverse[None, :]).to(tl.float16)
        acc += tl.dot(tile, small, input_precision=PRECISION) * power[None, :]
    else:
        acc = tl.dot(tile, x.to(tile.dtype), acc, input_precision=PRECISION)
    return acc
