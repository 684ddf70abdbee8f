"""Choosing for the tokens of a prompt, in ONNX's textual syntax: pooled blocks.

The meaning is that of `reattend.mixers.selecting.blocks` (`queries: pooled`): what is chosen
depends on all tokens of a call. Letters: B rows, H query heads, N new tokens, M tokens so far, R
regions of queries, Q blocks of keys, c tokens per block, K rows that a region reads.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import read_rows

# Regions [B, R] of c queries each, at multiples of c: the block of each, where it begins, and the
# region of each query.
PLACES = """
      c_less = Sub (c, one)
      n_less = Sub (n, one)
      n_more = Add (n_less, c_less)
      n_blocks = Div (n_more, c)
      regions = Add (n_blocks, one)
      first_region = Div (write, c)
      region_number = Range (zero, regions, one)
      region_number_1 = Unsqueeze (region_number, axis_1)
      query_block = Div (place_bn, c)
      first_region_1 = Unsqueeze (first_region, axis_1)
      region_bn = Sub (query_block, first_region_1)
      region_block = Add (first_region_1, region_number)
      region_from = Mul (region_block, c)"""

# Means of the queries of a block against means of keys; a region's own block is chosen and counts.
POOLED = f"""
      c = Constant <value_int: int = @block> ()
      c_1 = Unsqueeze (c, axis_0)
      axis_3 = Constant <value_ints = [3]> ()
      axis_4 = Constant <value_ints = [4]> ()
      axis_end = Constant <value_ints = [-1]> ()
      float_one = Constant <value_float = 1.0> (){PLACES}
      region_b1n = Unsqueeze (region_bn, axis_1)
      in_region = Equal (region_b1n, region_number_1)
      real_bn = GreaterOrEqual (place_any, zero)
      real_b1n = Unsqueeze (real_bn, axis_1)
      is_member = And (in_region, real_b1n)
      member = Cast <to = 1> (is_member)
      member_count = ReduceSum <keepdims = 1> (member, axis_end)
      member_many = Max (member_count, float_one)
      member_share = Div (member, member_many)
      member_heads = Unsqueeze (member_share, axis_1)
      q_float = Cast <to = 1> (q)
      q_mean = MatMul (member_heads, q_float)

      real_b = Sub (lengths, start)
      last_real_b = Sub (real_b, one)
      axes_123 = Constant <value_ints = [1, 2, 3]> ()
      last_real = Unsqueeze (last_real_b, axes_123)
      last_real_1 = Unsqueeze (last_real_b, axis_1)
      total_more = Add (total, c_less)
      many = Div (total_more, c)
      many_1 = Unsqueeze (many, axis_0)
      span = Mul (many, c)
      key_number = Range (zero, span, one)
      key_number_in = Min (key_number, last_row)
      key_any = Gather <axis = 2> (present_key, key_number_in)
      key_float = Cast <to = 1> (key_any)
      key_number_col = Unsqueeze (key_number, axis_1)
      is_held = LessOrEqual (key_number_col, last_real)
      nothing_float = Constant <value_float = 0.0> ()
      key_held = Where (is_held, key_float, nothing_float)
      d = Shape <start = 3, end = 4> (key)
      as_blocks = Concat <axis = 0> (same, g, others, c_1, d)
      key_blocks = Reshape (key_held, as_blocks)
      key_sum = ReduceSum <keepdims = 0> (key_blocks, axis_3)
      number = Range (zero, many, one)
      block_first = Mul (number, c)
      block_end = Add (block_first, c_less)
      block_last = Min (block_end, last_real)
      block_less = Sub (block_last, block_first)
      block_many_any = Add (block_less, one)
      block_many_int = Max (block_many_any, one)
      block_many = Cast <to = 1> (block_many_int)
      block_many_t = Transpose <perm = [0, 1, 3, 2]> (block_many)
      key_mean = Div (key_sum, block_many_t)

      q_heads = Concat <axis = 0> (same, g, others, same)
      q_mean_group = Reshape (q_mean, q_heads)
      factor_float = Cast <to = 1> (factor)
      q_mean_scaled = Mul (q_mean_group, factor_float)
      key_mean_t = Transpose <perm = [0, 1, 3, 2]> (key_mean)
      rank_rows = MatMul (q_mean_scaled, key_mean_t)
      regions_1 = Unsqueeze (regions, axis_0)
      as_heads = Concat <axis = 0> (same, others, regions_1, many_1)
      rank_scores = Reshape (rank_rows, as_heads)

      write_1 = Unsqueeze (write, axis_1)
      first_query = Max (region_from, write_1)
      region_to = Add (region_from, c_less)
      last_query = Min (region_to, last_real_1)
      first_query_1 = Unsqueeze (first_query, axes_13)
      last_query_1 = Unsqueeze (last_query, axes_13)
      first_after = LessOrEqual (block_first, first_query_1)
      first_behind = Sub (first_query_1, block_last)
      first_near = Less (first_behind, reach)
      first_sees = And (first_after, first_near)
      last_after = LessOrEqual (block_first, last_query_1)
      last_behind = Sub (last_query_1, block_last)
      last_near = Less (last_behind, reach)
      last_sees = And (last_after, last_near)
      candidate = Or (first_sees, last_sees)
      region_own = Unsqueeze (region_block, axes_13)
      own_region = Equal (number, region_own)
      forced = Constant <value_int = 0> ()
      certain = And (own_region, candidate)
RANK
      none = Less (ranked, ranked)
      by_block = ScatterElements <axis = 3> (none, order, taken)
      with_own = Or (by_block, certain)"""

# Places of the queries of a region, to be held against its rows: query_place [B, 1, R, c, 1].
SEEN_BY = """
      axes_14 = Constant <value_ints = [1, 4]> ()
      region_from_1 = Unsqueeze (region_from, axis_2)
      region_place = Add (region_from_1, inside)
      query_place = Unsqueeze (region_place, axes_14)"""

# The queries of every region with `rows` [B, H, R, K], of which each sees `visible`
# [B, H, R, c, K].
READ = f"""
      first_11 = Unsqueeze (first, axes_12)
      q_at_any = Sub (region_place, first_11)
      q_at_in = Clip (q_at_any, zero, last)
      as_q_at = Concat <axis = 0> (same, one_1, others, one_1)
      q_at_flat = Reshape (q_at_in, as_q_at)
      q_at = Expand (q_at_flat, by_heads)
      q_flat = GatherND <batch_dims = 2> (q, q_at)
      as_regions_q = Concat <axis = 0> (same, same, regions_1, c_1, d)
      q_regions = Reshape (q_flat, as_regions_q)
      q_scaled = Mul (q_regions, factor)
      rows_in = Clip (rows, zero, last_row){read_rows("present_key", "present_value")}
      key_t = Transpose <perm = [0, 1, 2, 4, 3]> (read_key)
      scores_any = MatMul (q_scaled, key_t)
MANY_WEIGHTS
      y_regions = MatMul (weights, read_value)
      as_rows = Concat <axis = 0> (same, same, others, value_width)
      y_rows = Reshape (y_regions, as_rows)
      region_begin_bn = Mul (region_bn, c)
      in_block_bn = Mod (place_bn, c)
      y_at_bn = Add (region_begin_bn, in_block_bn)
      y_at_b1n1 = Unsqueeze (y_at_bn, axes_13)
      y_at = Expand (y_at_b1n1, by_heads)
      several_y = GatherND <batch_dims = 2> (y_rows, y_at)"""

# Every region of queries with the rows that it reads, gathered: those of its blocks, and first
# tokens and a window that lie in none of them. Of these a query sees what is not later than itself,
# nor further than the row's reach. A row that is not read begins after every query.
REGIONS = f"""
      total = Gather (lengths, zero)
      total_1 = Unsqueeze (total, axis_0)
CHOSEN
      rank_shape = Shape (ranked)
      certain_each = Expand (certain, rank_shape)
      certain_best = GatherElements <axis = 3> (certain_each, order)
      taken_all = Or (taken, certain_best)
      inside = Range (zero, c, one)
      order_1 = Unsqueeze (order, axis_4)
      order_first = Mul (order_1, c)
      pick_5 = Add (order_first, inside)
      taken_1 = Unsqueeze (taken_all, axis_4)
      pick_begin_5 = Where (taken_1, pick_5, endless)
      flat = Concat <axis = 0> (same, same, same, others)
      pick = Reshape (pick_5, flat)
      pick_begin = Reshape (pick_begin_5, flat)
      heads_1 = Shape <start = 1, end = 2> (q)
      by_heads = Concat <axis = 0> (one_1, heads_1, one_1, one_1)
      region_begin = Unsqueeze (region_from, axes_13)
      span_less = Sub (span, one)
      sink = Range (zero, sinks_int, one)
      no_row = Mul (region_begin, zero)
      sink_any = Add (no_row, sink)
      sink_row = Expand (sink_any, by_heads)
      sink_in = Min (sink_row, span_less)
      sink_block = Div (sink_in, c)
      sink_read = GatherElements <axis = 3> (with_own, sink_block)
      sink_begin = Where (sink_read, endless, sink_row)
      sink_end = Add (sink_row, reach)
      back = Range (one, w, one)
      window_any = Sub (region_begin, back)
      window_row = Expand (window_any, by_heads)
      window_in = Clip (window_row, zero, span_less)
      window_block = Div (window_in, c)
      window_read = GatherElements <axis = 3> (with_own, window_block)
      window_sink = Less (window_row, sinks_int)
      window_gone = Or (window_read, window_sink)
      window_begin = Where (window_gone, endless, window_row)
      window_reach = Min (w, reach)
      window_end = Add (window_row, window_reach)
      pick_end = Add (pick, reach)
      rows = Concat <axis = 3> (sink_row, window_row, pick)
      rows_begin = Concat <axis = 3> (sink_begin, window_begin, pick_begin)
      rows_end = Concat <axis = 3> (sink_end, window_end, pick_end){SEEN_BY}
      begins = Unsqueeze (rows_begin, axis_3)
      ends = Unsqueeze (rows_end, axis_3)
      is_past = LessOrEqual (begins, query_place)
      is_near = Less (query_place, ends)
      visible = And (is_past, is_near)
      axes_12 = Constant <value_ints = [1, 2]> (){READ}"""
