"""Columns and diagonals of a prompt, in ONNX's textual syntax: MInference.

The meaning is that of `reattend.mixers.selecting.vertical_slash`. A tile of queries of one head
gathers the rows that one of its lines passes for one of them (`selected_tiles.py`). Which of them
lie on a diagonal is the same for all tiles, moved: what c queries see of a row depends on its
distance from the first of them, and is listed once for a head by that distance. Letters: B rows, H
query heads, G KV heads, J query heads of each, N new tokens, M tokens so far, c queries of a tile,
K rows that it reads.
"""

from __future__ import annotations

from reattend.targets.onnx.selected_tiles import ALL_ROWS, tiled

#: attributes of the node, and their types
LINE_ATTRIBUTES = dict.fromkeys(
    ("columns", "slashes", "last_queries", "first_columns", "last_slashes"), "int"
)

# Probabilities of the last queries, summed by key and by distance; the best of both, with first
# tokens and a window: columns and slashes [B, H, M].
_LINES = """
      axes_12 = Constant <value_ints = [1, 2]> ()
      heads_1 = Shape <start = 1, end = 2> (q)
      by_heads = Concat <axis = 0> (one_1, heads_1, one_1, one_1)
      nothing_float = Constant <value_float = 0.0> ()
      sure = Constant <value_float = 1.0e30> ()
      never = Constant <value_float = -1.0> ()
      rarely = Constant <value_float = -0.5> ()
      last_int = Constant <value_int: int = @last_queries> ()
      last_many = Min (last_int, n)
      last_from = Sub (n, last_many)
      last_from_1 = Unsqueeze (last_from, axis_0)
      last_many_1 = Unsqueeze (last_many, axis_0)
      line_q = Slice (q, last_from_1, n_1, axis_2)
      line_place_bn = Slice (place_any, last_from_1, n_1, axis_1)
      line_place = Unsqueeze (line_place_bn, axes_13)
      line_group = Concat <axis = 0> (same, g, others, same)
      line_factored = Mul (line_q, factor)
      line_scaled = Reshape (line_factored, line_group)
      line_key = Slice (present_key, same, total_1, axis_2)
      line_key_t = Transpose <perm = [0, 1, 3, 2]> (line_key)
      line_products = MatMul (line_scaled, line_key_t)
      line_heads = Concat <axis = 0> (same, others, last_many_1, total_1)
      line_any = Reshape (line_products, line_heads)
      rank_scores = Cast <to = 1> (line_any)
CAP_RANKS
      number = Range (zero, total, one)
      line_apart = Sub (line_place, number)
      line_past = GreaterOrEqual (line_apart, zero)
      line_near = Less (line_apart, reach)
      line_sees = And (line_past, line_near)
      line_hidden = Constant <value_float = -1.0e38> ()
      line_masked = Where (line_sees, ranks, line_hidden)
      line_softmax = Softmax <axis = -1> (line_masked)
      line_p = Where (line_sees, line_softmax, nothing_float)

      real_b = Sub (lengths, start)
      real_b11 = Unsqueeze (real_b, axes_12)
      is_held = Less (number, real_b11)
      column_sum = ReduceSum <keepdims = 0> (line_p, axis_2)
      first_columns = Constant <value_int: int = @first_columns> ()
      column_first = Less (number, first_columns)
      column_lifted = Where (column_first, sure, column_sum)
      column_ranks = Where (is_held, column_lifted, never)
      columns_int = Constant <value_int: int = @columns> ()
      columns_most = Min (columns_int, total)
      columns_1 = Unsqueeze (columns_most, axis_0)
      column_best, column_order = TopK <axis = 2> (column_ranks, columns_1)
      column_taken = Greater (column_best, rarely)
      column_none = Less (column_ranks, column_ranks)
      columns_best = ScatterElements <axis = 2> (column_none, column_order, column_taken)
      is_sink = Less (number, sinks_int)
      columns = Or (columns_best, is_sink)

      total_less = Sub (total, one)
      line_key_at = Clip (line_apart, zero, total_less)
      line_at = Expand (line_key_at, by_heads)
      line_back = GatherElements <axis = 3> (line_p, line_at)
      slash_p = Where (line_past, line_back, nothing_float)
      slash_sum = ReduceSum <keepdims = 0> (slash_p, axis_2)
      last_slashes = Constant <value_int: int = @last_slashes> ()
      slash_last = Less (number, last_slashes)
      slash_lifted = Where (slash_last, sure, slash_sum)
      slash_ranks = Where (is_held, slash_lifted, never)
      slashes_int = Constant <value_int: int = @slashes> ()
      slashes_most = Min (slashes_int, total)
      slashes_1 = Unsqueeze (slashes_most, axis_0)
      slash_best, slash_order = TopK <axis = 2> (slash_ranks, slashes_1)
      slash_taken = Greater (slash_best, rarely)
      slashes_best = ScatterElements <axis = 2> (column_none, slash_order, slash_taken)
      in_window_of = Less (number, w)
      slashes_any = Or (slashes_best, in_window_of)
      in_reach = Less (number, reach)
      slashes = And (slashes_any, in_reach)"""

# Lines by KV head [B, G, J, M]; reached: whether one of c queries sees what lies so far before the
# last of them. Of every query, whose lines it has and where it stands, padding below 0.
_BY_HEAD = """
      c_most = Constant <value_int = @TILE> ()
      slash_short = Cast <to = 6> (slashes)
      axis_of_lines = Constant <value_int = 2> ()
      slashes_upto = CumSum (slash_short, axis_of_lines)
      c_before = Constant <value_ints = [0, 0, @TILE, 0, 0, 0]> ()
      slashes_moved = Pad (slashes_upto, c_before)
      slashes_under = Slice (slashes_moved, same, total_1, axis_2)
      is_reached = Less (slashes_under, slashes_upto)
      as_lines = Concat <axis = 0> (same, g, others, total_1)
      slash_lines = Reshape (slashes, as_lines)
      column_lines = Reshape (columns, as_lines)
      reached_lines = Reshape (is_reached, as_lines)
      each_1 = Div (heads_1, g)
      each = Squeeze (each_1, axis_0)
      member_any = Range (zero, each, one)
      member_short = Cast <to = 6> (member_any)
      member_each = Unsqueeze (member_short, axis_1)
      by_group = Concat <axis = 0> (g, each_1, one_1)
      member_group = Expand (member_each, by_group)
      members_beside = Reshape (member_group, by_heads)
      batch_1 = Shape <start = 0, end = 1> (q)
      by_query = Concat <axis = 0> (batch_1, heads_1, n_1, one_1)
      member_of = Expand (members_beside, by_query)
      stands_any = Unsqueeze (place_any, axes_13)
      stands_short = Cast <to = 6> (stands_any)
      stands_at = Expand (stands_short, by_query)
      none_short = Cast <to = 6> (zero)
      farthest = Min (reach, total)
      reach_short = Cast <to = 6> (farthest)
      c_less = Sub (c_most, one)
      c_less_1 = Unsqueeze (c_less, axis_0)
      c_less_short = Cast <to = 6> (c_less)
      c_less_back = Neg (c_less_short)
      passings = Add (total, c_less)
      passings_short = Cast <to = 6> (passings)
      passing = Range (zero, passings, one)
      passing_first = Unsqueeze (passing, axis_1)
      run_query = Min (n, c_most)
      inside = Range (zero, run_query, one)
      passing_at = Add (passing_first, inside)
      by_inside = Shape <start = 1> (passing_at)
      as_passings = Concat <axis = 0> (others, by_inside)
      no_lines = Concat <axis = 0> (each_1, c_less_1)
      no_slash = ConstantOfShape <value: tensor = bool[1] {0}> (no_lines)"""

# By how far a row lies before the first query, from c - 1 behind it on: which of c see it [J x, c].
_PASSED = """
          slash_between = Concat <axis = 1> (no_slash, slash_all, no_slash)
          passed_each = Gather <axis = 1> (slash_between, passing_at)
          passed = Reshape (passed_each, as_passings)"""
_READS = """
              member = ReduceMax <keepdims = 0> (member_tile)
              column_one = Gather (column_all, member)
              reached_one = Gather (reached_all, member)
              ago = Sub (last_place, key_row)
              is_behind = GreaterOrEqual (ago, none_short)
              ago_in = Max (ago, none_short)
              on_any_slash = Gather (reached_one, ago_in)
              on_any = Or (on_any_slash, column_one)
              is_read = And (on_any, is_behind)"""
_SEEN = """
              first_any = ReduceMin <keepdims = 0> (stands_tile)
              first_at = Max (first_any, c_less_back)
              first_passing = Add (first_at, c_less_short)
              member_passing = Mul (member, passings_short)
              passing_of_first = Add (first_passing, member_passing)
              passing_of_row = Sub (passing_of_first, row_read)
              on_slash_t = Gather (passed, passing_of_row)
              on_slash = Transpose <perm = [1, 0]> (on_slash_t)
              is_column = Gather (column_one, rows)
              is_past = GreaterOrEqual (place_tile, row_read)
              row_end = Add (row_read, reach_short)
              is_near = Less (place_tile, row_end)
              is_allowed = And (is_past, is_near)
              on_column = And (is_column, is_allowed)
              visible = Or (on_slash, on_column)"""
TILES_OF_LINES = (
    ALL_ROWS
    + _LINES
    + _BY_HEAD
    + tiled(
        {"member": "member_of", "stands": "stands_at"},
        {"slash": "slash_lines", "column": "column_lines", "reached": "reached_lines"},
        _READS,
        _SEEN,
        once=_PASSED,
    )
)
