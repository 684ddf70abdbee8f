"""Choosing single tokens while decoding, in ONNX's textual syntax: by labels, by what was noted.

The meaning is that of `reattend.mixers.selecting.channels` and `.recorded`. Letters: B rows, G KV
heads, N new tokens, r channels of a label, K tokens.
"""

from __future__ import annotations

from reattend.targets.onnx.selected_tiles import tiled

# Double Sparsity: a few channels of every key beside it
LABELS = """
  axes_02 = Constant <value_ints = [0, 2]> ()
  batch_1 = Shape <start = 0, end = 1> (key)
  channels_1 = Unsqueeze (channels, axes_02)
  by_new = Concat <axis = 0> (batch_1, one_1, n_1, one_1)
  new_channels = Expand (channels_1, by_new)
  new_label = GatherElements <axis = 3> (new_key, new_channels)
  present_label = TensorScatter <axis = 2> (past_label, new_label, write)"""
LABEL_OF_QUERY = """
  as_group = Concat <axis = 0> (same, g, others, same)
  q_to_rank = Mul (q, factor)
  q_group = Reshape (q_to_rank, as_group)
  q_many = Shape <start = 2, end = 3> (q_group)
  by_query = Concat <axis = 0> (batch_1, one_1, q_many, one_1)
  q_channels = Expand (channels_1, by_query)
  q_short = GatherElements <axis = 3> (q_group, q_channels)"""
BY_LABEL = (
    LABEL_OF_QUERY
    + """
  label_t = Transpose <perm = [0, 1, 3, 2]> (present_label)
  rank_rows = MatMul (q_short, label_t)
  as_heads = Concat <axis = 0> (same, others, n_1, room_1)
  rank_any = Reshape (rank_rows, as_heads)
  rank_scores = Cast <to = 1> (rank_any)
  number = Range (zero, room, one)
  unit_apart = Sub (place, number)
  unit_past = GreaterOrEqual (unit_apart, zero)
  unit_near = Less (unit_apart, reach)
  candidate = And (unit_past, unit_near)
  forced = Constant <value_int = 0> ()
RANK"""
)
PICK_OF_TOKENS = """
      pick = Identity (order)
      picked = Identity (taken)"""
MASK_OF_TOKENS = """
      axis_3_last = Constant <value_ints = [3]> ()
      none = Less (ranked, ranked)
      by_token = ScatterElements <axis = 3> (none, order, taken)
      chosen = Slice (by_token, same, total_1, axis_3_last)"""

# of every query the first key that its block sees [B, H, N, 1]
_REACHED = """
      place_more = Add (place, one)
      free = Min (place_more, reach)
      q_heads_1 = Shape <start = 1, end = 2> (q)
      by_heads = Concat <axis = 0> (one_1, q_heads_1, one_1, one_1)
      reached_any = Sub (place_more, free)
      reached_short = Cast <to = 6> (reached_any)
      reached = Expand (reached_short, by_heads)"""

# Where each query's number is known beforehand, nothing is sorted. Tokens go from the last to the
# first, so that of equal ones the later is left out, in laps of several times as many as are
# chosen: as many of them as are to be chosen have a best token above a bound, so above it are all
# that are chosen, and few others. Of those as many of the least are left out as there are too many.
# A tile skips what is later than its queries.
_BOUNDS = """
      total = Gather (lengths, zero)
      four = Constant <value_int = 4> ()
      minus_one = Constant <value_int = -1> ()
BUDGET
      count_most = ReduceMax <keepdims = 0> (count)
      lap_least = Mul (count_most, four)
      laps_any = Div (total, lap_least)
      laps_most = Max (laps_any, one)
      back_rows = Add (total, laps_most)
      back_first = Sub (back_rows, one)
      key_number = Range (back_first, minus_one, minus_one)
      row_back = Min (key_number, last_row)
      label_back = Gather <axis = 2> (present_label, row_back)
      used_key = Gather <axis = 2> (present_key, row_back)
      used_value = Gather <axis = 2> (present_value, row_back)
      as_choosers = Concat <axis = 0> (same, q_heads_1, n_1, others)
      chooser = Reshape (q_short, as_choosers)
      count_heads = Expand (count, by_heads)
      window_any = Sub (place_more, w)
      window_short = Cast <to = 6> (window_any)
      window = Expand (window_short, by_heads)
      sinks_short = Cast <to = 6> (sinks_int)
      barely = Constant <value_float = -0.9e38> ()
      barely_none = Constant <value_float = 0.5e38> ()
      no_rank = Constant <value_float = 1.0e38> ()"""
_BEST = """
              count_tile_most = ReduceMax <keepdims = 0> (count_tile)
              count_tile_1 = Unsqueeze (count_tile_most, axis_0)
              last_whole = Cast <to = 7> (last_place)
              needed = Add (last_whole, one)
              lap_least_own = Mul (count_tile_most, four)
              laps_own = Div (needed, lap_least_own)
              laps_some = Max (laps_own, one)
              laps = Min (laps_some, laps_most)
              laps_less = Sub (laps, one)
              needed_up = Add (needed, laps_less)
              lap = Div (needed_up, laps)
              laps_1 = Unsqueeze (laps, axis_0)
              lap_1 = Unsqueeze (lap, axis_0)
              as_laps = Concat <axis = 0> (others, laps_1, lap_1)
              lap_rows = Mul (lap, laps)
              skipped_rows = Sub (back_rows, lap_rows)
              skipped_rows_1 = Unsqueeze (skipped_rows, axis_0)
              back_rows_1 = Unsqueeze (back_rows, axis_0)
              label = Slice (label_all, skipped_rows_1, back_rows_1, axis_0)
              rank_row = Slice (key_row, skipped_rows_1, back_rows_1, axis_0)
              label_t = Transpose <perm = [1, 0]> (label)
              rank_any = MatMul (chooser_tile, label_t)
              rank_scores = Cast <to = 1> (rank_any)
CAP_RANKS
              is_later = Less (place_tile, rank_row)
              is_gone = Less (rank_row, reached_tile)
              is_out = Or (is_later, is_gone)
              out_byte = Cast <to = 2> (is_out)
              out_rank = DequantizeLinear (out_byte, hidden_score)
              ranked = Add (ranks, out_rank)
              by_lap = Reshape (ranked, as_laps)
              best_of_lap = ReduceMax <keepdims = 0> (by_lap, axis_1)
              best_values, best_at = TopK <axis = 1, sorted = 0> (best_of_lap, count_tile_1)
              bound_any = ReduceMin <keepdims = 1> (best_values, axis_1)
              bound = Max (bound_any, barely)
              is_above = GreaterOrEqual (ranked, bound)
              above_float = Cast <to = 1> (is_above)
              above_sum = ReduceSum <keepdims = 1> (above_float, axis_1)
              above_many = Cast <to = 7> (above_sum)
              surplus = Sub (above_many, count_tile)
              surplus_most = ReduceMax <keepdims = 0> (surplus)
              listed_many = Max (surplus_most, one)
              listed_1 = Unsqueeze (listed_many, axis_0)
              is_below = Not (is_above)
              below_byte = Cast <to = 2> (is_below)
              below_rank = DequantizeLinear (below_byte, no_rank)
              rank_above = Add (ranks, below_rank)
              least, least_at = TopK <axis = 1, largest = 0> (rank_above, listed_1)
              standing = Range (zero, listed_many, one)
              is_enough = GreaterOrEqual (standing, surplus)
              is_listed = Less (least, barely_none)
              is_kept = And (is_enough, is_listed)
              is_chosen = ScatterElements <axis = 1> (is_above, least_at, is_kept)
              in_window = GreaterOrEqual (rank_row, window_tile)
              in_sinks = Less (rank_row, sinks_short)
              is_beside = Or (in_window, in_sinks)
              is_wanted = Or (is_chosen, is_beside)
              is_in = Not (is_out)
              is_seen = And (is_wanted, is_in)

              one_by_c = Concat <axis = 0> (one_1, run_c_1)
              each_one = ConstantOfShape <value: tensor = float[1] {1.0}> (one_by_c)
              above_by_any = MatMul (each_one, above_float)
              above_any = Squeeze (above_by_any, axis_0)
              is_above_any = Greater (above_any, shown_score)
              window_first = ReduceMin <keepdims = 0> (window_tile)
              is_near_any = GreaterOrEqual (rank_row, window_first)
              is_above_or_near = Or (is_above_any, is_near_any)
              is_any = Or (is_above_or_near, in_sinks)
              is_early = LessOrEqual (rank_row, last_place)
              is_wanted_by_any = And (is_any, is_early)
              is_skipped = ConstantOfShape <value: tensor = bool[1] {0}> (skipped_rows_1)
              is_read = Concat <axis = 0> (is_skipped, is_wanted_by_any)"""
_SEEN_READ = """
              seen_t = Transpose <perm = [1, 0]> (is_seen)
              seen_rows = Sub (rows, skipped_rows)
              seen_read_t = Gather (seen_t, seen_rows)
              visible = Transpose <perm = [1, 0]> (seen_read_t)"""
TILES_OF_LABELS = (
    LABEL_OF_QUERY
    + _REACHED
    + _BOUNDS
    + tiled(
        {"chooser": "chooser", "count": "count_heads", "reached": "reached", "window": "window"},
        {"label": "label_back"},
        _BEST,
        _SEEN_READ,
    )
)

# TidalDecode: one layer notes each head's best tokens, [B, H, 1, K]; where there are fewer, the
# token itself, which is read in any case
NOTING = """
  noting_step = Equal (n, one)
  topk = Constant <value_int: int = @topk> ()
  topk_1 = Unsqueeze (topk, axis_0)
  heads_1 = Shape <start = 1, end = 2> (q)
  noted = If (noting_step) <
    then_branch = note () => (noted_now)
    {
      note_group = Concat <axis = 0> (same, g, others, same)
      note_q = Mul (q, factor)
      note_q_scaled = Reshape (note_q, note_group)
      note_key_t = Transpose <perm = [0, 1, 3, 2]> (present_key)
      note_rows = MatMul (note_q_scaled, note_key_t)
      note_heads = Concat <axis = 0> (same, others, n_1, room_1)
      note_any = Reshape (note_rows, note_heads)
      note_scores = Cast <to = 1> (note_any)
      note_row = Range (zero, room, one)
      note_apart = Sub (place, note_row)
      note_past = GreaterOrEqual (note_apart, zero)
      note_near = Less (note_apart, reach)
      note_allowed = And (note_past, note_near)
      note_hidden = Constant <value_float = -1.0e38> ()
      note_barely = Constant <value_float = -0.9e38> ()
      note_ranked = Where (note_allowed, note_scores, note_hidden)
      note_most = Min (topk_1, room_1)
      note_best, note_order = TopK <axis = 3, largest = 1, sorted = 1> (note_ranked, note_most)
      note_real = Greater (note_best, note_barely)
      note_found = Where (note_real, note_order, place)
      note_missing = Sub (topk_1, note_most)
      note_fill_shape = Concat <axis = 0> (one_1, heads_1, one_1, note_missing)
      note_fill = Expand (place, note_fill_shape)
      noted_now = Concat <axis = 3> (note_found, note_fill)
    },
    else_branch = no_note () => (noted_nothing)
    {
      batch_1 = Shape <start = 0, end = 1> (key)
      nothing_shape = Concat <axis = 0> (batch_1, heads_1, one_1, topk_1)
      noted_nothing = Expand (zero, nothing_shape)
    }
  >"""
PICK_OF_NOTED = """
      pick = Identity (noted)
      picked = GreaterOrEqual (place, pick)"""
