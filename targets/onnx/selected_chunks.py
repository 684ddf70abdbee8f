"""Choosing by chunks of tokens, in ONNX's textual syntax: DHSA.

The meaning is that of `reattend.mixers.selecting.segments`. Everything is counted in chunks: those
that a query may choose from, how many tokens of each it may have, and which is the one that its
budget cuts follow from where chunks begin and end. Letters: B rows, G KV heads, J queries of each,
N new tokens, M tokens so far, K chunks, d key width.
"""

from __future__ import annotations

from reattend.targets.onnx.selected_tiles import ALL_ROWS, tiled

# Of every chunk its first and last token; of one whose end is not known, the last so far.
_ENDS = """
      heads_1 = Shape <start = 1, end = 2> (q)
      group_1 = Div (heads_1, g)
      as_ranks = Concat <axis = 0> (same, g, group_1, n_1, chunks_1)
      as_group = Concat <axis = 0> (same, g, others, same)
      q_to_rank = Mul (q, factor)
      q_short = Reshape (q_to_rank, as_group)
      end_in = Min (known_end, so_far_less)
      end_more = Add (end_in, one)
      begin_first = Slice (end_more, same, one_1, axis_2)
      no_begin = Mul (begin_first, zero)
      begin_shifted = Concat <axis = 2> (no_begin, end_more)
      begin = Slice (begin_shifted, same, chunks_1, axis_2)
      count_any = Sub (end_more, begin)
      count = Max (count_any, one)
      count_float = Cast <to = 1> (count)
      count_root = Sqrt (count_float)"""

# rank_scores [B, G, J, N, K]: products with sums of keys, over the root of their number. One token
# sums its products: M numbers, where keys are M d.
_SUMS_OF_PRODUCTS = """
      present_key_t = Transpose <perm = [0, 1, 3, 2]> (present_key)
      product_rows = MatMul (q_short, present_key_t)
      product_float = Cast <to = 1> (product_rows)
      product_used = Slice (product_float, same, so_far_1, axis_3)
      as_products = Concat <axis = 0> (same, g, group_1, n_1, so_far_1)
      products = Reshape (product_used, as_products)
      axes_23 = Constant <value_ints = [2, 3]> ()
      chunk_5 = Unsqueeze (chunk, axes_23)
      by_head_5 = Concat <axis = 0> (one_1, one_1, group_1, n_1, one_1)
      chunk_h = Expand (chunk_5, by_head_5)
      no_sum = Constant <value_float = 0.0> ()
      as_sums = Concat <axis = 0> (batch_1, g, group_1, n_1, chunks_1)
      no_sums = Expand (no_sum, as_sums)
      chunk_sums = ScatterElements <axis = 4, reduction = "add"> (no_sums, chunk_h, products)
      count_root_5 = Unsqueeze (count_root, axes_23)
      rank_scores = Div (chunk_sums, count_root_5)
CAP_RANKS"""

# Several multiply with sums of keys: differences of running sums, which start anew at every
# multiple of the longest chunk, where a chunk ends in any case.
_PRODUCTS_WITH_SUMS = """
      three_axis = Constant <value_int = 3> ()
      long = Min (longest_int, so_far)
      long_1 = Unsqueeze (long, axis_0)
      so_far_up = Add (so_far_less, long)
      long_many = Div (so_far_up, long)
      long_rows = Mul (long_many, long)
      long_row = Range (zero, long_rows, one)
      long_row_in = Min (long_row, last_row)
      long_key_any = Gather <axis = 2> (present_key, long_row_in)
      long_key = Cast <to = 1> (long_key_any)
      as_long = Concat <axis = 0> (same, same, others, long_1, d)
      long_blocks = Reshape (long_key, as_long)
      long_sums = CumSum (long_blocks, three_axis)
      as_rows_d = Concat <axis = 0> (same, same, others, d)
      sum_upto = Reshape (long_sums, as_rows_d)
      end_index = Unsqueeze (end_in, others)
      upto_end = GatherND <batch_dims = 2> (sum_upto, end_index)
      before_any = Sub (begin, one)
      before_in = Max (before_any, zero)
      before_index = Unsqueeze (before_in, others)
      upto_before = GatherND <batch_dims = 2> (sum_upto, before_index)
      begin_inside = Mod (begin, long)
      is_inside = Greater (begin_inside, zero)
      inside_float = Cast <to = 1> (is_inside)
      inside_1 = Unsqueeze (inside_float, others)
      sum_before = Mul (upto_before, inside_1)
      chunk_sum = Sub (upto_end, sum_before)
      root_1 = Unsqueeze (count_root, others)
      chunk_key = Div (chunk_sum, root_1)
      chunk_key_t = Transpose <perm = [0, 1, 3, 2]> (chunk_key)
      q_short_float = Cast <to = 1> (q_short)
      rank_rows = MatMul (q_short_float, chunk_key_t)
      rank_scores = Reshape (rank_rows, as_ranks)
CAP_RANKS"""

# size [B, G, N, K]: tokens of a chunk that a query may choose; left_over [B, G, N, 1]: how many it
# may have of them all. Tokens behind the last known end are read in any case, and count. The last
# `local` tokens lie in the node's window.
_ROOM = """
      known_end_1 = Unsqueeze (known_end, axis_2)
      delay = Constant <value_int: int = @delay> ()
      known_by = Sub (place, delay)
      is_closed = LessOrEqual (known_end_1, known_by)
      local_int = Constant <value_int: int = @local> ()
      old_last = Sub (place, local_int)
      place_more = Add (place, one)
      reach_any = Sub (place_more, reach)
      reach_first = Max (reach_any, zero)
      end_row = Unsqueeze (end_in, axis_2)
      begin_row = Unsqueeze (begin, axis_2)
      end_32 = Cast <to = 6> (end_row)
      begin_32 = Cast <to = 6> (begin_row)
      old_last_32 = Cast <to = 6> (old_last)
      reach_first_32 = Cast <to = 6> (reach_first)
      one_32 = Cast <to = 6> (one)
      zero_32 = Cast <to = 6> (zero)
      free_last = Min (end_32, old_last_32)
      free_first = Max (begin_32, reach_first_32)
      free_less = Sub (free_last, free_first)
      free_any = Add (free_less, one_32)
      free_some = Max (free_any, zero_32)
      closed_32 = Cast <to = 6> (is_closed)
      size = Mul (free_some, closed_32)

      visible_many = Min (place_more, reach)
      topk_int = Constant <value_int: int = @topk> ()
      has_topk = Greater (topk_int, zero)
      ratio_float = Constant <value_float: float = @ratio> ()
      visible_float = Cast <to = 1> (visible_many)
      exact = Mul (visible_float, ratio_float)
      exact_up = Ceil (exact)
      exact_int = Cast <to = 7> (exact_up)
      budget_any = Where (has_topk, topk_int, exact_int)
      budget = Min (budget_any, visible_many)
      free_32 = ReduceSum <keepdims = 1> (size, axis_end)
      free_many = Cast <to = 7> (free_32)
      sure_many = Sub (visible_many, free_many)
      left_over = Sub (budget, sure_many)"""

# No query takes more chunks than so many of the smallest fill its budget, two that its ends cut,
# and the one that the budget cuts.
_MOST = """
      is_known = Less (known_end, so_far)
      known_count = Where (is_known, count, so_far)
      smallest, smallest_at = TopK <axis = 2, largest = 0, sorted = 1> (known_count, chunks_1)
      smallest_upto = CumSum (smallest, two_axis)
      left_most = ReduceMax <keepdims = 0> (left_over)
      is_filling = Less (smallest_upto, left_most)
      filling_int = Cast <to = 7> (is_filling)
      filling_many = ReduceSum <keepdims = 0> (filling_int, axis_2)
      filling_most = ReduceMax <keepdims = 0> (filling_many)
      three = Constant <value_int = 3> ()
      most_any = Add (filling_most, three)
      most = Min (most_any, chunks)
      most_1 = Unsqueeze (most, axis_0)"""

# chosen [B, H, N, M]: whole chunks in their order, those that are read in any case, and of the one
# that the budget cuts the nearest tokens.
_TAKEN = """
      four_axis = Constant <value_int = 4> ()
      size_1 = Unsqueeze (size, axis_2)
      is_empty = Equal (size_1, zero_32)
      empty_rank = Constant <value_float = -1.0e38> ()
      chunk_ranks = Where (is_empty, empty_rank, ranks)
      best_chunk, order = TopK <axis = 4, largest = 1, sorted = 1> (chunk_ranks, most_1)
      by_head_size = Concat <axis = 0> (one_1, one_1, group_1, one_1, one_1)
      size_h = Expand (size_1, by_head_size)
      size_sorted = GatherElements <axis = 4> (size_h, order)
      upto_sorted = CumSum (size_sorted, four_axis)
      left_32 = Cast <to = 6> (left_over)
      left_1 = Unsqueeze (left_32, axis_2)
      is_whole = LessOrEqual (upto_sorted, left_1)
      is_some = Greater (size_sorted, zero_32)
      is_taken = And (is_whole, is_some)
      no_chunk = Less (chunk_ranks, chunk_ranks)
      taken = ScatterElements <axis = 4> (no_chunk, order, is_taken)
      is_open = Not (is_closed)
      open_1 = Unsqueeze (is_open, axis_2)
      taken_or_open = Or (taken, open_1)

      whole_int = Cast <to = 7> (is_whole)
      whole_many = ReduceSum <keepdims = 1> (whole_int, axis_end)
      most_less = Sub (most, one)
      cut_at = Min (whole_many, most_less)
      cut_chunk = GatherElements <axis = 4> (order, cut_at)
      cut_size = GatherElements <axis = 4> (size_sorted, cut_at)
      cut_upto = GatherElements <axis = 4> (upto_sorted, cut_at)
      cut_before = Sub (cut_upto, cut_size)
      cut_room = Sub (left_1, cut_before)
      has_room = Greater (cut_room, zero_32)
      has_more = Less (cut_room, cut_size)
      is_cut = And (has_room, has_more)
      as_list = Concat <axis = 0> (same, same, others, one_1)
      cut_index = Reshape (cut_chunk, as_list)
      cut_end_list = GatherND <batch_dims = 2> (end_in, cut_index)
      cut_end_32 = Cast <to = 6> (cut_end_list)
      as_cut = Concat <axis = 0> (same, same, group_1, n_1, one_1)
      cut_end = Reshape (cut_end_32, as_cut)
      old_last_1 = Unsqueeze (old_last_32, axis_2)
      cut_last = Min (cut_end, old_last_1)
      cut_less = Sub (cut_last, cut_room)
      cut_begin = Add (cut_less, one_32)
      so_far_32 = Cast <to = 6> (so_far)
      cut_first = Where (is_cut, cut_begin, so_far_32)"""

#: chosen [B, H, N, M]
MASK_OF_CHUNKS = """
      as_table = Concat <axis = 0> (same, same, others, chunks_1)
      by_chunk_rows = Reshape (taken_or_open, as_table)
      chunk_table = Transpose <perm = [0, 1, 3, 2]> (by_chunk_rows)
      chunk_index = Unsqueeze (chunk, others)
      by_token = GatherND <batch_dims = 2> (chunk_table, chunk_index)
      by_token_t = Transpose <perm = [0, 1, 3, 2]> (by_token)
      as_chosen = Concat <axis = 0> (same, heads_1, n_1, so_far_1)
      in_chunk = Reshape (by_token_t, as_chosen)
      as_column = Concat <axis = 0> (same, heads_1, n_1, one_1)
      cut_first_4 = Reshape (cut_first, as_column)
      cut_last_4 = Reshape (cut_last, as_column)
      number_32 = Cast <to = 6> (number)
      from_cut = LessOrEqual (cut_first_4, number_32)
      upto_cut = LessOrEqual (number_32, cut_last_4)
      in_cut = And (from_cut, upto_cut)
      chosen = Or (in_chunk, in_cut)"""
_CHOSEN = _ROOM + _MOST + _TAKEN

# first_seen [B, H, N, K + 1]: the first token of every chunk that a query sees, and the first of
# sinks. Whatever follows in the chunk is chosen, or lies in the window.
_FIRST_SEEN = """
      begin_5 = Unsqueeze (begin_32, axis_2)
      whole_first = Where (taken_or_open, begin_5, so_far_32)
      first_else = GatherElements <axis = 4> (whole_first, cut_chunk)
      first_of_cut = Where (is_cut, cut_begin, first_else)
      chosen_first = ScatterElements <axis = 4> (whole_first, cut_chunk, first_of_cut)
      window_any = Sub (place_more, w)
      window_32 = Cast <to = 6> (window_any)
      window_5 = Unsqueeze (window_32, axis_2)
      beside_first = Min (chosen_first, window_5)
      no_chunk_first = Mul (first_of_cut, zero_32)
      first_any = Concat <axis = 4> (beside_first, no_chunk_first)
      reach_5 = Unsqueeze (reach_first_32, axis_2)
      first_near = Max (first_any, reach_5)
      as_first = Concat <axis = 0> (same, heads_1, n_1, others)
      first_seen = Reshape (first_near, as_first)
      is_sink = Less (number, sinks_int)
      chunk_or_sink = Where (is_sink, chunks, chunk)"""
_READS = """
              first_t = Transpose <perm = [1, 0]> (first_tile)
              first_of_any = ReduceMin <keepdims = 0> (first_t, axis_1)
              first_of_row = Gather (first_of_any, chunk_all)
              is_shown_any = LessOrEqual (first_of_row, key_row)
              is_before = LessOrEqual (key_row, last_place)
              is_read = And (is_shown_any, is_before)"""
_SEEN = """
              chunk_read = Gather (chunk_all, rows)
              first_read_t = Gather (first_t, chunk_read)
              row_read_1 = Unsqueeze (row_read, axis_1)
              place_t = Transpose <perm = [1, 0]> (place_tile)
              is_shown_t = LessOrEqual (first_read_t, row_read_1)
              is_past_t = LessOrEqual (row_read_1, place_t)
              visible_t = And (is_shown_t, is_past_t)
              visible = Transpose <perm = [1, 0]> (visible_t)"""
#: several tokens: what they choose; then many, and what few see
CHOICE_OF_CHUNKS = _ENDS + _PRODUCTS_WITH_SUMS + _CHOSEN
TILES_OF_CHUNKS = (
    ALL_ROWS
    + _FIRST_SEEN
    + tiled({"first": "first_seen"}, {"chunk": "chunk_or_sink"}, _READS, _SEEN)
)
PICK_OF_CHUNKS = (
    _ENDS
    + _SUMS_OF_PRODUCTS
    + _CHOSEN
    + MASK_OF_CHUNKS
    + """
      chosen_int = Cast <to = 7> (chosen)
      chosen_many = ReduceSum <keepdims = 1> (chosen_int, axis_end)
      chosen_most = ReduceMax <keepdims = 0> (chosen_many)
      chosen_most_1 = Unsqueeze (chosen_most, axis_0)
      chosen_float = Cast <to = 1> (chosen)
      pick_best, pick = TopK <axis = 3, sorted = 0> (chosen_float, chosen_most_1)
      half = Constant <value_float = 0.5> ()
      picked = Greater (pick_best, half)"""
)
