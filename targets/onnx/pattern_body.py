"""The body of `PatternAttention` in ONNX's textual syntax: any union of terms, standard operators.

The state holds every row. Which of them the queries of a call see is computed from positions, and
only those are gathered: a decode step reads what its pattern shows, but nothing is forgotten.

Positions count from the first real token; a row of padding sees itself, so that it stays finite.
"""

from __future__ import annotations

from collections.abc import Collection

from reattend.targets.onnx.fragments import finished

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
  index = Unsqueeze (index_bn, axis_2)
  row = Range (zero, m, one)
  i_bn = Sub (index_bn, start_b1)
  i = Unsqueeze (i_bn, axis_2)
  j_bm = Sub (row, start_b1)
  j = Unsqueeze (j_bm, axis_1)
  apart = Sub (index, row)
  is_past = GreaterOrEqual (apart, zero)
  is_real = GreaterOrEqual (j, zero)
  is_near = Less (apart, reach)
  past_real = And (is_past, is_real)
  allowed = And (past_real, is_near)
TERMS
  wanted = And (allowed, UNION)
  itself = Equal (apart, zero)
  seen_bnm = Or (wanted, itself)
  seen_int = Cast <to = 6> (seen_bnm)
  seen_by_any = ReduceMax <keepdims = 0> (seen_int, axes_01)
  is_seen = Cast <to = 9> (seen_by_any)
  read_1 = NonZero (is_seen)
  read = Squeeze (read_1, axis_0)
  seen = Gather <axis = 2> (seen_bnm, read)
  read_key = Gather <axis = 2> (key, read)
  read_value = Gather <axis = 2> (value, read)
  visible = Unsqueeze (seen, axis_1)
  by_group = Concat <axis = 0> (same, g, others, same)
  q_rows = Reshape (q, by_group)
  q_scaled = Mul (q_rows, factor)
  key_t = Transpose <perm = [0, 1, 3, 2]> (read_key)
  score_rows = MatMul (q_scaled, key_t)
  by_head = Concat <axis = 0> (same, others, n_1, same)
  scores_any = Reshape (score_rows, by_head)
SOFTMAX
  weight_rows = Reshape (weights, by_group)
  y_rows = MatMul (weight_rows, read_value)
  y = Reshape (y_rows, by_head)
}"""

# Each gives a boolean NAME that broadcasts to [B, N, M]. A term that a node does not have hides
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


def pattern_body(terms: Collection[str] = TERMS, capped: bool = True) -> str:
    """`PatternAttention` without the domain's line.

    Args:
        terms: those of `TERMS` that some node has; at least one.
        capped: some node may have a softcap.
    """
    used = [name for name in TERMS if name in terms]
    lines, union = "".join(_TERMS[name] for name in used), used[0]
    for name in used[1:]:
        lines += f"\n  {union}_or_{name} = Or ({union}, {name})"
        union = f"{union}_or_{name}"
    body = _PATTERN.replace("TERMS", lines).replace("UNION", union)
    return finished(body, capped)
