"""What the terms of a pattern see, in ONNX's textual syntax, for `PatternAttention`."""

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


#: in the order of the body. A term that a node does not have hides everything: 0 sinks, a window of
#: no token, a stride of no period, lists of -1.
TERMS = {
    "sinks": Term(
        """
  sinks_int = Constant <value_int: int = @sinks> ()""",
        """
  sinks = Less (j, sinks_int)""",
    ),
    "window": Term(
        """
  window_int = Constant <value_int: int = @window> ()
  slope = Constant <value: tensor = @window_slope> ()""",
        """
  so_far_int = Add (i, one)
  so_far = Cast <to = 11> (so_far_int)
  grown_exact = Mul (so_far, slope)
  grown_floor = Floor (grown_exact)
  grown = Cast <to = 7> (grown_floor)
  width = Add (window_int, grown)
  window = Less (apart, width)""",
    ),
    "stride": Term(
        """
  stride_ints = Constant <value_ints: ints = @stride> ()
  one_1 = Constant <value_ints = [1]> ()
  two_1 = Constant <value_ints = [2]> ()
  three_1 = Constant <value_ints = [3]> ()
  period_any = Slice (stride_ints, same, one_1)
  offset = Slice (stride_ints, one_1, two_1)
  stride_block = Slice (stride_ints, two_1, three_1)
  period = Max (period_any, one)
  has_stride = Greater (period_any, zero)""",
        """
  block_of = Div (j, stride_block)
  moved = Add (block_of, offset)
  phase = Mod (moved, period)
  on_stride = Equal (phase, zero)
  stride = And (on_stride, has_stride)""",
    ),
    # a power of two lies in [a, b] iff b has more bits than a - 1
    "powers": Term(
        """
  powers_int = Constant <value_int: int = @powers> ()
  has_powers = Greater (powers_int, zero)
  powers_block = Max (powers_int, one)""",
        """
  query_block = Div (i, powers_block)
  key_block = Div (j, powers_block)
  blocks_apart = Sub (query_block, key_block)
  blocks_less = Sub (blocks_apart, one)
  common_bits = BitwiseAnd (blocks_apart, blocks_less)
  one_bit = Equal (common_bits, zero)
  not_none = Greater (blocks_apart, zero)
  is_power = And (one_bit, not_none)
  powers = And (is_power, has_powers)""",
        """
  first_block_r = Div (i_r, powers_block)
  last_block_r = Div (last_r, powers_block)
  key_block_r = Div (j_r, powers_block)
  nearest_r = Sub (first_block_r, key_block_r)
  farthest_r = Sub (last_block_r, key_block_r)
  nearest_less_r = Sub (nearest_r, one)
  nearest_in_r = Max (nearest_less_r, zero)
  changed_bits_r = BitwiseXor (nearest_in_r, farthest_r)
  is_less_r = Less (nearest_in_r, farthest_r)
  is_longer_r = Less (nearest_in_r, changed_bits_r)
  is_power_r = And (is_less_r, is_longer_r)
  powers_r = And (is_power_r, has_powers)""",
    ),
    "columns": Term(
        """
  columns_ints = Constant <value_ints: ints = @columns> ()""",
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
  slashes_ints = Constant <value_ints: ints = @slashes> ()
  farthest_slash = ReduceMax <keepdims = 0> (slashes_ints)
  last_distance = Add (farthest_slash, one)
  table_size = Add (last_distance, one)
  distance = Range (zero, table_size, one)
  distance_1 = Unsqueeze (distance, others)
  slash_hits = Equal (distance_1, slashes_ints)
  slash_int = Cast <to = 6> (slash_hits)
  slash_any = ReduceMax <keepdims = 0> (slash_int, others)
  slash_table = Cast <to = 9> (slash_any)
  slash_many = Cast <to = 7> (slash_any)
  slash_upto = CumSum (slash_many, zero)
  slash_before = CumSum <exclusive = 1> (slash_many, zero)""",
        """
  table_at = Clip (apart, zero, last_distance)
  slashes = Gather (slash_table, table_at)""",
        """
  nearest_at_r = Clip (apart_r, zero, last_distance)
  farthest_at_r = Clip (far_r, zero, last_distance)
  upto_r = Gather (slash_upto, farthest_at_r)
  under_r = Gather (slash_before, nearest_at_r)
  slashes_r = Less (under_r, upto_r)""",
    ),
}
