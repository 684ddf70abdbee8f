"""The body of `PatternAttention` in ONNX's textual syntax: any union of terms, standard operators.

The state holds every row. Which of them queries see is computed from positions, and only those are
gathered, for a short call together and for a long one by regions of queries: a decode step reads
what its pattern shows, but nothing is forgotten.

Positions count from the first real token; a row of padding sees itself, so that it stays finite.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from reattend.targets.onnx.fragments import RUNS, every_score, finished, read_rows

_PATTERN = """PatternAttention
<scale: float, sliding_window: int = 0, softcap: float = 0.0, sinks: int = 0, window: int = 0,
 window_slope: tensor, stride: ints, powers: int = 0, columns: ints, slashes: ints>
(q, key, value, kv_start, kv_len) => (y)
{
COMMON
  axes_01 = Constant <value_ints = [0, 1]> ()
  m_1 = Shape <start = 2, end = 3> (key)
  m = Squeeze (m_1, axis_0)
  start_b1 = Unsqueeze (start, axis_1)
  length_b1 = Unsqueeze (lengths, axis_1)
  query = Range (zero, n, one)
  before = Sub (length_b1, n)
  index_bn = Add (before, query)
  row = Range (zero, m, one)
  j_bm = Sub (row, start_b1)
  j_b1m = Unsqueeze (j_bm, axis_1)
  run_length = Constant <value_int = @RUN> ()
  is_long = Greater (n, run_length)
  y = If (is_long) <
    then_branch = by_region () => (regions_y)
    {
BY_REGION
    },
    else_branch = together () => (together_y)
    {
TOGETHER
    }
  >
}"""

# all queries of the call read what one of them sees
_TOGETHER = """
      index = Unsqueeze (index_bn, axis_2)
      i_bn = Sub (index_bn, start_b1)
      i = Unsqueeze (i_bn, axis_2)
      j = Identity (j_b1m)
      apart = Sub (index, row)
SEEN
      seen_int = Cast <to = 6> (seen)
      seen_by_any = ReduceMax <keepdims = 0> (seen_int, axes_01)
      is_seen = Cast <to = 9> (seen_by_any)
      read_1 = NonZero (is_seen)
      read = Squeeze (read_1, axis_0)
      seen_read = Gather <axis = 2> (seen, read)
      read_key = Gather <axis = 2> (key, read)
      read_value = Gather <axis = 2> (value, read)
      visible = Unsqueeze (seen_read, axis_1)"""
_OUTPUT = every_score("read_key", "read_value", "together_y")

# The queries of each region read its own rows, and those that one of them may see by its first and
# last position; which they do see is looked at for those rows only. With powers, what a region
# sees grows with it, and it is half as long.
_BY_REGION = f"""
      powers_any = Constant <value_int: int = @powers> ()
      is_by_powers = Greater (powers_any, zero)
      run_half = Constant <value_int = @HALF> ()
      run_most = Where (is_by_powers, run_half, run_length){RUNS}
      axis_end = Constant <value_ints = [-1]> ()
      axis_3 = Constant <value_ints = [3]> ()
      index_run = Gather <axis = 1> (index_bn, run_at)
      as_index_run = Concat <axis = 0> (same, runs_1, run_c_1)
      index_brc = Reshape (index_run, as_index_run)
      first_index = ReduceMin <keepdims = 1> (index_brc, axis_end)
      last_index = ReduceMax <keepdims = 1> (index_brc, axis_end)
      start_b11 = Unsqueeze (start_b1, axis_2)
      first_any = Sub (first_index, start_b11)
      i_r = Max (first_any, zero)
      last_r = Sub (last_index, start_b11)
      j_r = Identity (j_b1m)
      apart_r = Sub (i_r, j_r)
      far_r = Sub (last_r, j_r)
REGION_TERMS
      real_r = GreaterOrEqual (j_r, zero)
      past_r = GreaterOrEqual (far_r, zero)
      near_r = Less (apart_r, reach)
      allowed_r = And (near_r, real_r)
      wanted_r = And (allowed_r, REGION_UNION)
      is_after_first = GreaterOrEqual (row, first_index)
      wanted_or_own = Or (wanted_r, is_after_first)
      read_r = And (wanted_or_own, past_r)
      read_float = Cast <to = 1> (read_r)
      read_many = ReduceSum <keepdims = 0> (read_float, axis_end)
      read_most_float = ReduceMax <keepdims = 0> (read_many)
      read_most = Cast <to = 7> (read_most_float)
      read_most_1 = Unsqueeze (read_most, axis_0)
      read_best, rows = TopK <axis = 2, largest = 1, sorted = 0> (read_float, read_most_1)

      index_c1 = Unsqueeze (index_brc, axis_end)
      rows_1k = Unsqueeze (rows, axis_2)
      start_4 = Unsqueeze (start_b11, axis_3)
      i = Sub (index_c1, start_4)
      j = Sub (rows_1k, start_4)
      apart = Sub (index_c1, rows_1k)
SEEN
      seen_by_group = Unsqueeze (seen, axis_1)
      visible = Unsqueeze (seen_by_group, axis_3)
      rows_of_all = Unsqueeze (rows, axis_1)
      row_one = Constant <value_ints = [1]> ()
      by_kv_head = Concat <axis = 0> (row_one, g, row_one, row_one)
      rows_in = Expand (rows_of_all, by_kv_head){read_rows("key", "value")}
REGIONS
      regions_y = Slice (y_flat, same, n_1, axis_2)"""

# seen: what queries at i see of keys at j, apart from each other; all broadcast
_SEEN = """
      is_past = GreaterOrEqual (apart, zero)
      is_real = GreaterOrEqual (j, zero)
      is_near = Less (apart, reach)
      past_real = And (is_past, is_real)
      allowed = And (past_real, is_near)
TERMS
      wanted = And (allowed, UNION)
      itself = Equal (apart, zero)
      seen = Or (wanted, itself)"""

# Each gives a boolean NAME of positions i and j. A term that a node does not have hides
# everything: 0 sinks, a window of no token, a stride of no period, lists of -1.
_TERMS = {
    "sinks": """
  sinks_int = Constant <value_int: int = @sinks> ()
  sinks = Less (j, sinks_int)""",
    "window": """
  window_int = Constant <value_int: int = @window> ()
  slope = Constant <value: tensor = @window_slope> ()
  so_far_int = Add (i, one)
  so_far = Cast <to = 11> (so_far_int)
  grown_exact = Mul (so_far, slope)
  grown_floor = Floor (grown_exact)
  grown = Cast <to = 7> (grown_floor)
  width = Add (window_int, grown)
  window = Less (apart, width)""",
    "stride": """
  stride_ints = Constant <value_ints: ints = @stride> ()
  one_1 = Constant <value_ints = [1]> ()
  two_1 = Constant <value_ints = [2]> ()
  three_1 = Constant <value_ints = [3]> ()
  period_any = Slice (stride_ints, same, one_1)
  offset = Slice (stride_ints, one_1, two_1)
  stride_block = Slice (stride_ints, two_1, three_1)
  period = Max (period_any, one)
  block_of = Div (j, stride_block)
  moved = Add (block_of, offset)
  phase = Mod (moved, period)
  on_stride = Equal (phase, zero)
  has_stride = Greater (period_any, zero)
  stride = And (on_stride, has_stride)""",
    "powers": """
  powers_int = Constant <value_int: int = @powers> ()
  has_powers = Greater (powers_int, zero)
  powers_block = Max (powers_int, one)
  query_block = Div (i, powers_block)
  key_block = Div (j, powers_block)
  blocks_apart = Sub (query_block, key_block)
  blocks_less = Sub (blocks_apart, one)
  common_bits = BitwiseAnd (blocks_apart, blocks_less)
  one_bit = Equal (common_bits, zero)
  not_none = Greater (blocks_apart, zero)
  is_power = And (one_bit, not_none)
  powers = And (is_power, has_powers)""",
    "columns": """
  columns_ints = Constant <value_ints: ints = @columns> ()
  j_1 = Unsqueeze (j, others)
  column_hits = Equal (j_1, columns_ints)
  column_int = Cast <to = 6> (column_hits)
  column_any = ReduceMax <keepdims = 0> (column_int, others)
  columns = Cast <to = 9> (column_any)""",
    # a table over distances: [N, M, listed] would be large
    "slashes": """
  slashes_ints = Constant <value_ints: ints = @slashes> ()
  farthest = ReduceMax <keepdims = 0> (slashes_ints)
  two = Constant <value_int = 2> ()
  table_size = Add (farthest, two)
  distance = Range (zero, table_size, one)
  distance_1 = Unsqueeze (distance, others)
  slash_hits = Equal (distance_1, slashes_ints)
  slash_int = Cast <to = 6> (slash_hits)
  slash_any = ReduceMax <keepdims = 0> (slash_int, others)
  slash_table = Cast <to = 9> (slash_any)
  last_distance = Add (farthest, one)
  table_at = Clip (apart, zero, last_distance)
  slashes = Gather (slash_table, table_at)""",
}
#: terms of `PatternAttention`, in the order of the body
TERMS = tuple(_TERMS)


# Those that are more for a region than for its first query, at i_r; far_r: how far its last one is
# from a key. A power of two lies in [a, b] iff b has more bits than a - 1.
_REGION_TERMS = {
    "powers": """
  powers_int_r = Constant <value_int: int = @powers> ()
  has_powers_r = Greater (powers_int_r, zero)
  powers_block_r = Max (powers_int_r, one)
  first_block_r = Div (i_r, powers_block_r)
  last_block_r = Div (last_r, powers_block_r)
  key_block_r = Div (j_r, powers_block_r)
  nearest_r = Sub (first_block_r, key_block_r)
  farthest_r = Sub (last_block_r, key_block_r)
  nearest_less_r = Sub (nearest_r, one)
  nearest_in_r = Max (nearest_less_r, zero)
  changed_bits_r = BitwiseXor (nearest_in_r, farthest_r)
  is_less_r = Less (nearest_in_r, farthest_r)
  is_longer_r = Less (nearest_in_r, changed_bits_r)
  is_power_r = And (is_less_r, is_longer_r)
  powers_r = And (is_power_r, has_powers_r)""",
    "slashes": """
  slashes_ints_r = Constant <value_ints: ints = @slashes> ()
  farthest_slash_r = ReduceMax <keepdims = 0> (slashes_ints_r)
  two_r = Constant <value_int = 2> ()
  table_size_r = Add (farthest_slash_r, two_r)
  distance_r = Range (zero, table_size_r, one)
  distance_1_r = Unsqueeze (distance_r, others)
  slash_hits_r = LessOrEqual (slashes_ints_r, distance_1_r)
  is_slash_r = GreaterOrEqual (slashes_ints_r, zero)
  slash_real_r = And (slash_hits_r, is_slash_r)
  slash_int_r = Cast <to = 7> (slash_real_r)
  slash_count_r = ReduceSum <keepdims = 0> (slash_int_r, others)
  none_before_r = Sub (zero, zero)
  none_before_1_r = Unsqueeze (none_before_r, others)
  slash_before_r = Concat <axis = 0> (none_before_1_r, slash_count_r)
  last_distance_r = Add (farthest_slash_r, one)
  nearest_at_r = Clip (apart_r, zero, last_distance_r)
  farthest_at_r = Clip (far_r, zero, last_distance_r)
  upto_r = Gather (slash_count_r, farthest_at_r)
  under_r = Gather (slash_before_r, nearest_at_r)
  slashes_r = Less (under_r, upto_r)""",
}


def _of_region(text: str) -> str:
    """The lines of a term for the first query of a region."""
    names = {*re.findall(r"^\s*(\w+) =", text, re.MULTILINE), "i", "j", "apart"}
    return re.sub(r"(?<!@)\b(\w+)\b", lambda m: m[0] + "_r" * (m[0] in names), text)


def _union(lines: dict[str, str], end: str = "") -> tuple[str, str]:
    """The lines of terms, and the name of their union."""
    text, (union, *others) = "".join(lines.values()), lines
    union += end
    for name in others:
        text += f"\n  {union}_or_{name} = Or ({union}, {name}{end})"
        union = f"{union}_or_{name}"
    return text, union


def pattern_body(terms: Collection[str] = TERMS, capped: bool = True) -> str:
    """`PatternAttention` without the domain's line.

    Args:
        terms: those of `TERMS` that some node has; at least one.
        capped: some node may have a softcap.
    """
    used = {name: text for name, text in _TERMS.items() if name in terms}
    own, union = _union(used)
    first = {n: _REGION_TERMS.get(n) or _of_region(text) for n, text in used.items()}
    of_region, region_union = _union(first, "_r")
    body = _PATTERN.replace("\nBY_REGION", _BY_REGION).replace("\nTOGETHER", _TOGETHER + _OUTPUT)
    body = body.replace("\nREGION_TERMS", of_region).replace("REGION_UNION", region_union)
    body = body.replace("\nSEEN", _SEEN).replace("\nTERMS", own).replace("UNION", union)
    return finished(body, capped, lifted=False)  # few of the rows read are hidden from a query
