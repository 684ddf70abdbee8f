"""What the terms of a pattern see, in ONNX's textual syntax."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """A boolean under the term's name.

    Attributes:
        once: lines that depend on attributes alone.
        seen: of positions i and j, `apart` from each other.
        region: under NAME_r, whether some query of a region may see j_r, where that is more than
            what its first query, at i_r, sees; far_r: how far its last one is from a key.
    """

    once: str
    seen: str
    region: str = ""


#: in the order of the body. A term that a node does not have hides everything: 0 sinks, a stride of
#: no period, lists of -1. Every node has a window, of one token at least: a query sees itself.
TERMS = {
    "sinks": Term(
        """
  sinks_int = Constant <value_int: int = @sinks> ()
  sinks_p = Cast <to = 6> (sinks_int)""",
        """
  sinks = Less (j, sinks_p)""",
    ),
    "window": Term(
        """
  window_int = Constant <value_int: int = @window> ()
  width = Cast <to = 6> (window_int)""",
        """
  window = Less (apart, width)""",
    ),
    # also a window that does not grow
    "window_slope": Term(
        """
  window_int = Constant <value_int: int = @window> ()
  window_p = Cast <to = 6> (window_int)
  slope = Constant <value: tensor = @window_slope> ()""",
        """
  so_far_p = Add (i, p1)
  so_far = Cast <to = 11> (so_far_p)
  grown_exact = Mul (so_far, slope)
  grown_floor = Floor (grown_exact)
  grown = Cast <to = 6> (grown_floor)
  width_any = Add (window_p, grown)
  width = Max (width_any, p1)
  window_slope = Less (apart, width)""",
    ),
    "stride": Term(
        """
  stride_any = Constant <value_ints: ints = @stride> ()
  stride_ints = Cast <to = 6> (stride_any)
  one_1 = Constant <value_ints = [1]> ()
  two_1 = Constant <value_ints = [2]> ()
  three_1 = Constant <value_ints = [3]> ()
  period_any = Slice (stride_ints, same, one_1)
  offset = Slice (stride_ints, one_1, two_1)
  stride_block = Slice (stride_ints, two_1, three_1)
  period = Max (period_any, p1)
  has_stride = Greater (period_any, p0)""",
        """
  block_of = Div (j, stride_block)
  moved = Add (block_of, offset)
  phase = Mod (moved, period)
  on_stride = Equal (phase, p0)
  stride = And (on_stride, has_stride)""",
    ),
    # A power of two lies in [a, b] iff b is longer than a - 1 in bits. Of two numbers the larger is
    # longer iff the bits in which they differ, as a number, exceed the smaller.
    "powers": Term(
        """
  powers_any = Constant <value_int: int = @powers> ()
  has_powers = Greater (powers_any, zero)
  one_block = Constant <value_int = 2147483647> ()
  powers_block_any = Where (has_powers, powers_any, one_block)
  powers_block = Cast <to = 6> (powers_block_any)""",
        """
  query_block = Div (i, powers_block)
  key_block = Div (j, powers_block)
  blocks_apart = Sub (query_block, key_block)
  blocks_less = Sub (blocks_apart, p1)
  changed_bits = BitwiseXor (blocks_apart, blocks_less)
  powers = Greater (changed_bits, blocks_less)""",
        """
  first_block_r = Div (i_r, powers_block)
  last_block_r = Div (last_r, powers_block)
  key_block_r = Div (j_r, powers_block)
  nearest_r = Sub (first_block_r, key_block_r)
  farthest_r = Sub (last_block_r, key_block_r)
  nearest_less_r = Sub (nearest_r, p1)
  nearest_in_r = Max (nearest_less_r, p0)
  changed_bits_r = BitwiseXor (nearest_in_r, farthest_r)
  is_less_r = Less (nearest_in_r, farthest_r)
  is_longer_r = Less (nearest_in_r, changed_bits_r)
  powers_r = And (is_less_r, is_longer_r)""",
    ),
    "columns": Term(
        """
  columns_any = Constant <value_ints: ints = @columns> ()
  columns_ints = Cast <to = 6> (columns_any)""",
        """
  j_1 = Unsqueeze (j, others)
  column_hits = Equal (j_1, columns_ints)
  column_int = Cast <to = 6> (column_hits)
  column_any = ReduceMax <keepdims = 0> (column_int, others)
  columns = Cast <to = 9> (column_any)""",
    ),
    # tables over distances, which is listed and how many up to it are: [N, M, listed] would be
    # large
    "slashes": Term(
        """
  slashes_any = Constant <value_ints: ints = @slashes> ()
  slashes_ints = Cast <to = 6> (slashes_any)
  farthest_slash = ReduceMax <keepdims = 0> (slashes_ints)
  last_distance = Add (farthest_slash, p1)
  table_size = Add (last_distance, p1)
  distance = Range (p0, table_size, p1)
  distance_1 = Unsqueeze (distance, others)
  slash_hits = Equal (distance_1, slashes_ints)
  slash_int = Cast <to = 6> (slash_hits)
  slash_any = ReduceMax <keepdims = 0> (slash_int, others)
  slash_table = Cast <to = 9> (slash_any)
  slash_upto = CumSum (slash_any, zero)
  slash_before = CumSum <exclusive = 1> (slash_any, zero)""",
        """
  table_at = Clip (apart, p0, last_distance)
  slashes = Gather (slash_table, table_at)""",
        """
  nearest_at_r = Clip (apart_r, p0, last_distance)
  farthest_at_r = Clip (far_r, p0, last_distance)
  upto_r = Gather (slash_upto, farthest_at_r)
  under_r = Gather (slash_before, nearest_at_r)
  slashes_r = Less (under_r, upto_r)""",
    ),
}
