"""Several tokens that choose blocks each for itself, in ONNX's textual syntax.

What neighbours choose together is most of the text, so no rows are gathered for them. Every block
of keys meets the queries that chose it, those of a block cut into tiles of t; results of a query
are merged by log-sum-exp. Of a query's row a copy is made for each of its blocks, of a block's rows
one for each tile. Letters: B rows, S what chooses, J query heads of each, N new tokens, Q blocks, K
blocks that one query reads, c tokens of a block, T tiles of t queries, d and e widths.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import MANY, either

# by_block [B, S, N, Q]: the chosen ones; with_own, and those one by one: all_blocks, all_taken
_NEEDED = """
      none = Less (ranked, ranked)
      by_block = ScatterElements <axis = 3> (none, order, taken)
      is_own_block = Equal (number, own_block)
      with_own = Or (by_block, is_own_block)"""

#: where every pair of a query and a block stands among the tiles
_SLOTS = """
      axis_3r = Constant <value_ints = [3]> ()
      axis_4r = Constant <value_ints = [4]> ()
      axes_45 = Constant <value_ints = [4, 5]> ()
      two_r = Constant <value_int = 2> ()
      three_r = Constant <value_int = 3> ()
      tile_most = Constant <value_int = @TILE> ()
      t = Min (tile_most, n)
      t_1 = Unsqueeze (t, axis_0)
      t_less = Sub (t, one)
      choosers = Shape <start = 1, end = 2> (ranked)
      batch_1 = Shape <start = 0, end = 1> (q)
      by_chooser = Concat <axis = 0> (one_1, choosers, one_1, one_1)
      own_blocks = Expand (own_block, by_chooser)
      own_taken = Equal (own_blocks, own_blocks)
      all_blocks = Concat <axis = 3> (own_blocks, order)
      all_taken = Concat <axis = 3> (own_taken, taken)
      needed = Cast <to = 7> (with_own)
      met_before = CumSum <exclusive = 1> (needed, two_r)
      met = ReduceSum <keepdims = 1> (needed, axis_2)
      met_up = Add (met, t_less)
      tiles_of = Div (met_up, t)
      tile_end = CumSum (tiles_of, three_r)
      tile_begin = Sub (tile_end, tiles_of)
      tiles = ReduceMax <keepdims = 0> (tile_end)
      tiles_1 = Unsqueeze (tiles, axis_0)
      slots = Mul (tiles, t)
      slots_1 = Unsqueeze (slots, axis_0)
      slot_begin = Mul (tile_begin, t)
      slot_any = Add (slot_begin, met_before)
      slot_of_pick = GatherElements <axis = 3> (slot_any, all_blocks)
      slot_4 = Where (all_taken, slot_of_pick, slots)
      flat_3 = Concat <axis = 0> (same, same, others)
      slot_3 = Reshape (slot_4, flat_3)
      query_n1 = Unsqueeze (query, axis_1)
      slot_shape = Shape (slot_4)
      query_4 = Expand (query_n1, slot_shape)
      query_3 = Reshape (query_4, flat_3)
      slots_more = Add (slots_1, one_1)
      by_slot = Concat <axis = 0> (batch_1, choosers, slots_more)
      no_query = Expand (zero, by_slot)
      query_any = ScatterElements <axis = 2> (no_query, slot_3, query_3)
      slot_query = Slice (query_any, same, slots_1, axis_2)
      tile = Range (zero, tiles, one)
      tile_column = Unsqueeze (tile, axis_1)
      is_behind = LessOrEqual (tile_end, tile_column)
      behind_int = Cast <to = 7> (is_behind)
      tile_block_any = ReduceSum <keepdims = 0> (behind_int, axis_3r)
      used_most = Div (last_of_all, c)
      tile_block = Min (tile_block_any, used_most)"""

#: every tile against its block. Blocks before a query's own are seen whole, unless the block's own
#: pattern ends; a table of what is seen inside of one is faster than comparing.
_TILES = """
      j_1 = Div (heads_r, choosers)
      as_choosers = Concat <axis = 0> (same, choosers, j_1, n_1, others)
      q_split_r = Reshape (q, as_choosers)
      q_beside_r = Transpose <perm = [0, 1, 3, 2, 4]> (q_split_r)
      q_flat = Reshape (q_beside_r, as_flat_rows)
      slot_index = Unsqueeze (slot_query, others)
      q_slots = GatherND <batch_dims = 2> (q_flat, slot_index)
      as_tiles = Concat <axis = 0> (same, same, tiles_1, others, d_r)
      q_tiles_any = Reshape (q_slots, as_tiles)
      q_tiles = Mul (q_tiles_any, factor)
      used = Add (used_most, one)
      used_rows = Mul (used, c)
      row_any = Range (zero, used_rows, one)
      row_in = Min (row_any, last_row)
      inside_r = Range (zero, c, one)
      as_index = Concat <axis = 0> (same, g, others, one_1)
      block_index = Reshape (tile_block, as_index)
      key_used = Gather <axis = 2> (present_key, row_in)
      value_used = Gather <axis = 2> (present_value, row_in)
      key_width = Mul (c_1, d_r)
      value_width = Mul (c_1, e_r)
      as_key_blocks = Concat <axis = 0> (same, same, others, key_width)
      as_value_blocks = Concat <axis = 0> (same, same, others, value_width)
      key_blocks = Reshape (key_used, as_key_blocks)
      value_blocks = Reshape (value_used, as_value_blocks)
      key_read = GatherND <batch_dims = 2> (key_blocks, block_index)
      value_read = GatherND <batch_dims = 2> (value_blocks, block_index)
      as_key_tiles = Concat <axis = 0> (same, choosers, tiles_1, c_1, d_r)
      as_value_tiles = Concat <axis = 0> (same, choosers, tiles_1, c_1, e_r)
      key_tiles = Reshape (key_read, as_key_tiles)
      value_tiles = Reshape (value_read, as_value_tiles)
      key_tiles_t = Transpose <perm = [0, 1, 2, 4, 3]> (key_tiles)
      tile_scores = MatMul (q_tiles, key_tiles_t)
      as_tile_scores = Concat <axis = 0> (same, same, same, t_1, j_1, c_1)
      scores_any = Reshape (tile_scores, as_tile_scores)

      place_b1n = Unsqueeze (place_bn, axis_1)
      by_place = Concat <axis = 0> (one_1, choosers, one_1)
      place_bsn = Expand (place_b1n, by_place)
      place_slot = GatherElements <axis = 2> (place_bsn, slot_query)
      place_by_tile = Concat <axis = 0> (same, same, tiles_1, t_1)
      place_tile = Reshape (place_slot, place_by_tile)
      tile_block_1 = Unsqueeze (tile_block, others)
      key_first = Mul (tile_block_1, c)
      ago = Sub (place_tile, key_first)
      bias = If (is_own) <
        then_branch = in_reach () => (near_bias)
        {
          ago_1 = Unsqueeze (ago, axes_45)
          is_past = LessOrEqual (inside_r, ago_1)
          ago_reached = Sub (ago_1, reach)
          is_near = Less (ago_reached, inside_r)
          is_seen = And (is_past, is_near)
          near_bias = Where (is_seen, shown_score, hidden_score)
        },
        else_branch = past () => (past_bias)
        {
          c_last = Sub (c, one)
          ago_in = Clip (ago, zero, c_last)
          inside_column = Unsqueeze (inside_r, axis_1)
          is_past_of = LessOrEqual (inside_r, inside_column)
          bias_of = Where (is_past_of, shown_score, hidden_score)
          past_bias_5 = Gather (bias_of, ago_in)
          past_bias = Unsqueeze (past_bias_5, axis_4r)
        }
      >
  scores = Cast <to = 1> (scores_any)
CAPPED
      masked = Add (capped, bias)
      weights_float = Softmax <axis = -1> (masked)
      weights = CastLike (weights_float, scores_any)
      as_weights = Concat <axis = 0> (same, same, same, others, c_1)
      weight_rows = Reshape (weights, as_weights)
      y_tiles = MatMul (weight_rows, value_tiles)
      largest = ReduceMax <keepdims = 0> (masked, others)
      largest_part = ReduceMax <keepdims = 0> (weights_float, others)
      largest_log = Log (largest_part)
      total_log = Sub (largest, largest_log)"""

#: the parts of every query
_MERGED = """
      as_slots_j = Concat <axis = 0> (same, same, slots_1, j_1)
      log_slots = Reshape (total_log, as_slots_j)
      slot_last = Sub (slots, one)
      slot_in = Min (slot_3, slot_last)
      pick_index = Unsqueeze (slot_in, others)
      log_picks = GatherND <batch_dims = 2> (log_slots, pick_index)
      picks = Shape <start = 3, end = 4> (all_blocks)
      as_picks = Concat <axis = 0> (same, same, n_1, picks, j_1)
      log_5 = Reshape (log_picks, as_picks)
      taken_5 = Unsqueeze (all_taken, axis_4r)
      log_shown = Where (taken_5, log_5, hidden_score)
      query_part_float = Softmax <axis = 3> (log_shown)
      query_part = CastLike (query_part_float, q)
      query_part_6 = Unsqueeze (query_part, others)
      as_y_slots = Concat <axis = 0> (same, same, slots_1, others)
      y_slots = Reshape (y_tiles, as_y_slots)
      y_picks_any = GatherND <batch_dims = 2> (y_slots, pick_index)
      as_y_picks = Concat <axis = 0> (same, same, n_1, picks, j_1, e_r)
      y_picks = Reshape (y_picks_any, as_y_picks)
      y_parts = Mul (y_picks, query_part_6)
      y_by_chooser = ReduceSum <keepdims = 0> (y_parts, axis_3r)
      y_apart = Transpose <perm = [0, 1, 3, 2, 4]> (y_by_chooser)
      as_y = Concat <axis = 0> (same, heads_r, n_1, e_r)
      several_y = Reshape (y_apart, as_y)"""

_ROUTED = (
    """
      heads_r = Shape <start = 1, end = 2> (q)
      d_r = Shape <start = 3, end = 4> (key)
      e_r = Shape <start = 3, end = 4> (value)
      as_flat_rows = Concat <axis = 0> (same, same, same, others)
      last_of_all = ReduceMax <keepdims = 0> (place_bn)"""
    + _NEEDED
    + _SLOTS
    + _TILES
    + _MERGED
)


def routed_or(masked: str) -> str:
    """Lines for several tokens; few, or such that see sinks or a window beside, take `masked`."""
    return (
        MANY
        + """
      shown_beside = Add (sinks_int, w)
      is_alone = Equal (shown_beside, one)
      is_routed = And (is_many, is_alone)"""
        + either("is_routed", _ROUTED, masked)
    )
