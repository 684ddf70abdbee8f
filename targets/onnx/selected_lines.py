"""Columns and diagonals of a prompt, in ONNX's textual syntax: MInference.

The meaning is that of `reattend.mixers.selecting.vertical_slash`. Lines are the same for all
queries of a head, so a region of c queries reads the blocks of keys that a chosen diagonal passes
through, which lie at the same distances for every region, and the chosen columns that lie in none
of those. In a block each query sees what its lines show. Where that is half of the text, or queries
are few, all keys are read under a mask. Letters: B rows, H query heads, N new tokens, M tokens so
far, R regions, T blocks at a distance, C columns, K rows that a region reads.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import either
from reattend.targets.onnx.selected_prompts import PLACES, READ, SEEN_BY

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
      slashes = Or (slashes_best, in_window_of)"""

# The distances of blocks, and the columns, that some diagonal or query may need [B, H, T] and
# [B, H, C]; as many for every head.
_LISTED = """
      axis_3 = Constant <value_ints = [3]> ()
      c = Constant <value_int = @TILE> ()
      c_1 = Unsqueeze (c, axis_0)
      inside = Range (zero, c, one)
      total_up = Add (total_less, c)
      slash_blocks = Div (total_up, c)
      slash_span = Mul (slash_blocks, c)
      slash_any = Range (zero, slash_span, one)
      slash_in = Min (slash_any, total_less)
      slash_used = Gather <axis = 2> (slashes, slash_in)
      slash_float = Cast <to = 1> (slash_used)
      as_slash_blocks = Concat <axis = 0> (same, same, others, c_1)
      slash_by_block = Reshape (slash_float, as_slash_blocks)
      slash_block = ReduceMax <keepdims = 0> (slash_by_block, axis_3)
      first_block = Slice (slash_block, same, one_1, axis_2)
      no_block = Mul (first_block, nothing_float)
      slash_from = Concat <axis = 2> (slash_block, no_block)
      slash_upto = Concat <axis = 2> (no_block, slash_block)
      touched = Max (slash_from, slash_upto)
      touched_many = ReduceSum <keepdims = 0> (touched, axis_2)
      touched_most = ReduceMax <keepdims = 0> (touched_many)
      touched_int = Cast <to = 7> (touched_most)
      columns_float = Cast <to = 1> (columns)
      columns_many = ReduceSum <keepdims = 0> (columns_float, axis_2)
      columns_largest = ReduceMax <keepdims = 0> (columns_many)
      columns_count = Cast <to = 7> (columns_largest)
      touched_rows = Mul (touched_int, c)
      rows_many = Add (touched_rows, columns_count)
      rows_twice = Add (rows_many, rows_many)
      is_little = Less (rows_twice, total)
      is_many = LessOrEqual (c, n)
      is_gathered = And (is_little, is_many)"""

# rows [B, H, R, K] and visible [B, H, R, c, K]: first the blocks, then the columns
_GATHERED = f"""
      axis_4 = Constant <value_ints = [4]> ()
      half = Constant <value_float = 0.5> ()
      d = Shape <start = 3, end = 4> (key){PLACES}
      regions_1 = Unsqueeze (regions, axis_0){SEEN_BY}
      touched_1 = Unsqueeze (touched_int, axis_0)
      block_best, block_back = TopK <axis = 2, sorted = 0> (touched, touched_1)
      is_touched = Greater (block_best, half)
      region_block_4 = Unsqueeze (region_block, axes_13)
      block_back_1 = Unsqueeze (block_back, axis_2)
      key_block = Sub (region_block_4, block_back_1)
      key_block_1 = Unsqueeze (key_block, axis_4)
      key_first = Mul (key_block_1, c)
      block_rows_5 = Add (key_first, inside)
      flat_rows = Concat <axis = 0> (same, same, same, others)
      block_rows = Reshape (block_rows_5, flat_rows)

      axes_24 = Constant <value_ints = [2, 4]> ()
      inside_column = Unsqueeze (inside, axis_1)
      inside_apart = Sub (inside_column, inside)
      axis_of_t = Constant <value_ints = [1]> ()
      inside_apart_1 = Unsqueeze (inside_apart, axis_of_t)
      block_back_4 = Unsqueeze (block_back, axes_24)
      apart_first = Mul (block_back_4, c)
      line_apart_of = Add (apart_first, inside_apart_1)
      line_apart_in = Clip (line_apart_of, zero, total_less)
      flat_lines = Concat <axis = 0> (same, same, others)
      line_index = Reshape (line_apart_in, flat_lines)
      on_slash_flat = GatherElements <axis = 2> (slashes, line_index)
      touched_rows_1 = Unsqueeze (touched_rows, axis_0)
      as_lines = Concat <axis = 0> (same, same, one_1, c_1, touched_rows_1)
      on_slash = Reshape (on_slash_flat, as_lines)
      apart_past = GreaterOrEqual (line_apart_of, zero)
      apart_near = Less (line_apart_of, reach)
      is_touched_4 = Unsqueeze (is_touched, axes_24)
      apart_sees = And (apart_past, apart_near)
      apart_shown = And (apart_sees, is_touched_4)
      block_shown = Reshape (apart_shown, as_lines)
      block_row_in = Clip (block_rows, zero, total_less)
      block_row_index = Reshape (block_row_in, flat_lines)
      on_column_flat = GatherElements <axis = 2> (columns, block_row_index)
      as_by_region = Concat <axis = 0> (same, same, regions_1, one_1, touched_rows_1)
      on_column = Reshape (on_column_flat, as_by_region)
      is_row = GreaterOrEqual (block_rows, zero)
      is_row_5 = Unsqueeze (is_row, axis_3)
      on_line = Or (on_slash, on_column)
      on_row = And (is_row_5, block_shown)
      block_sees = And (on_line, on_row)

      columns_count_1 = Unsqueeze (columns_count, axis_0)
      listed_best, listed = TopK <axis = 2, sorted = 0> (columns_float, columns_count_1)
      is_listed = Greater (listed_best, half)
      listed_block = Div (listed, c)
      listed_block_1 = Unsqueeze (listed_block, axis_2)
      listed_back_any = Sub (region_block_4, listed_block_1)
      listed_back = Clip (listed_back_any, zero, slash_blocks)
      listed_back_flat = Reshape (listed_back, flat_lines)
      listed_in_flat = GatherElements <axis = 2> (touched, listed_back_flat)
      as_listed = Concat <axis = 0> (same, same, regions_1, columns_count_1)
      listed_in = Reshape (listed_in_flat, as_listed)
      in_no_block = Less (listed_in, half)
      is_listed_1 = Unsqueeze (is_listed, axis_2)
      is_apart = And (in_no_block, is_listed_1)
      listed_1 = Unsqueeze (listed, axis_2)
      as_listed_rows = Concat <axis = 0> (one_1, one_1, regions_1, one_1)
      listed_rows = Expand (listed_1, as_listed_rows)
      listed_begin = Where (is_apart, listed_1, endless)
      listed_end = Add (listed_1, reach)
      listed_begin_5 = Unsqueeze (listed_begin, axis_3)
      listed_end_5 = Unsqueeze (listed_end, axis_3)
      listed_past = LessOrEqual (listed_begin_5, query_place)
      listed_near = Less (query_place, listed_end_5)
      listed_sees = And (listed_past, listed_near)
      rows = Concat <axis = 3> (block_rows, listed_rows)
      visible = Concat <axis = 4> (block_sees, listed_sees){READ}"""

# chosen [B, H, N, M]. What a query sees by distance is what the query before it sees, moved by one:
# a row of all distances is repeated, and cut again into rows that are one shorter.
_CHOSEN = """
      band = Add (n, total)
      band_place = Range (zero, band, one)
      band_first = Add (first, last)
      band_first_1 = Unsqueeze (band_first, axes_12)
      band_apart = Sub (band_first_1, band_place)
      band_in = Clip (band_apart, zero, total_less)
      by_heads_3 = Concat <axis = 0> (one_1, heads_1, one_1)
      band_at = Expand (band_in, by_heads_3)
      band_seen = GatherElements <axis = 2> (slashes, band_at)
      band_1 = Unsqueeze (band_seen, axis_2)
      repeated = Concat <axis = 0> (one_1, one_1, n_1, one_1)
      band_rows = Expand (band_1, repeated)
      flat_bands = Concat <axis = 0> (same, same, others)
      band_flat = Reshape (band_rows, flat_bands)
      band_less = Sub (band, one)
      band_long = Mul (n, band_less)
      band_end = Add (band_long, last)
      last_1 = Unsqueeze (last, axis_0)
      band_end_1 = Unsqueeze (band_end, axis_0)
      band_cut = Slice (band_flat, last_1, band_end_1, axis_2)
      as_moved = Concat <axis = 0> (same, same, n_1, others)
      band_moved = Reshape (band_cut, as_moved)
      last_axis = Constant <value_ints = [3]> ()
      on_slash = Slice (band_moved, same, total_1, last_axis)
      on_column = Unsqueeze (columns, axis_2)
      chosen = Or (on_slash, on_column)"""


def lines_or(total: str, masked: str) -> str:
    """Lines for several tokens.

    Args:
        total: that say how many tokens there are.
        masked: that read every key; CHOSEN in them says which they see.
    """
    masked = masked.replace("\nCHOSEN", _CHOSEN)
    return f"{total}{_LINES}{_LISTED}{either('is_gathered', _GATHERED, masked)}"
