"""Several tokens that choose blocks each for itself, in ONNX's textual syntax.

What neighbours choose together is most of the text, so no rows are gathered for them. Every block
of keys meets the queries that chose it, those of a block cut into tiles of t; results of a query
are merged by log-sum-exp. Of a query's row a copy is made for each of its blocks, of a block's rows
one for each tile. Letters: B rows, S what chooses, J query heads of each, N new tokens, Q blocks, K
blocks that one query reads, c tokens of a block, T tiles of t queries, d and e widths.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import LIFT, MANY, either

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

#: every tile against its block, one of one head after another: mask and scores stay in a
#: processor's cache. Scanned by KV head [B G, ...], by what chooses with it [S / G, ...], and by
#: tile [T, ...].
_TILES = f"""
      j_1 = Div (heads_r, choosers)
      members = Div (choosers, g)
      as_choosers = Concat <axis = 0> (same, choosers, j_1, n_1, others)
      q_split_r = Reshape (q, as_choosers)
      q_beside_r = Transpose <perm = [0, 1, 3, 2, 4]> (q_split_r)
      q_factored = Mul (q_beside_r, factor)
      width_r = Mul (j_1, d_r)
      as_q_members = Concat <axis = 0> (others, members, n_1, width_r)
      q_members = Reshape (q_factored, as_q_members)
      query_short = Cast <to = 6> (slot_query)
      as_query_tiles = Concat <axis = 0> (others, members, tiles_1, t_1)
      query_tiles = Reshape (query_short, as_query_tiles)
      as_block_tiles = Concat <axis = 0> (others, members, tiles_1)
      block_short = Cast <to = 6> (tile_block)
      block_tiles = Reshape (block_short, as_block_tiles)
      key_sizes = Shape <start = 2> (present_key)
      value_sizes = Shape <start = 2> (present_value)
      as_key_heads = Concat <axis = 0> (others, key_sizes)
      as_value_heads = Concat <axis = 0> (others, value_sizes)
      key_heads = Reshape (present_key, as_key_heads)
      value_heads = Reshape (present_value, as_value_heads)
      place_b1n = Unsqueeze (place_bn, axis_1)
      place_short = Cast <to = 6> (place_b1n)
      by_key_heads = Concat <axis = 0> (one_1, g, one_1)
      place_heads_any = Expand (place_short, by_key_heads)
      as_place_heads = Concat <axis = 0> (others, n_1)
      place_heads = Reshape (place_heads_any, as_place_heads)
      none_short = Cast <to = 6> (zero)
      one_short = Cast <to = 6> (one)
      c_short = Cast <to = 6> (c)
      inside_r = Range (none_short, c_short, one_short)
BLOCK_ONCE
      as_q_rows = Concat <axis = 0> (others, d_r)
      as_tile_scores = Concat <axis = 0> (t_1, j_1, others)
      as_tile_y = Concat <axis = 0> (t_1, j_1, e_r)
      y_tiles, log_tiles = Scan <
        body = of_key_head (key_own, value_own, place_own, q_of, query_of, block_of)
          => (head_y, head_log)
        {{
          text_last = ReduceMax <keepdims = 0> (place_own)
          head_y, head_log = Scan <
            body = of_member (q_member, query_own, block_own) => (member_y, member_log)
            {{
              member_y, member_log = Scan <
                body = of_tile (tile_query, block_of_tile) => (tile_y, tile_log)
                {{
                  row_from = Mul (block_of_tile, c_short)
                  row_any = Add (row_from, inside_r)
                  row_read = Min (row_any, text_last)
                  key_read = Gather (key_own, row_read)
                  value_read = Gather (value_own, row_read)
                  q_any = Gather (q_member, tile_query)
                  q_rows = Reshape (q_any, as_q_rows)
                  key_read_t = Transpose <perm = [1, 0]> (key_read)
                  score_rows = MatMul (q_rows, key_read_t)
                  scores_any = Reshape (score_rows, as_tile_scores)
                  place_tile = Gather (place_own, tile_query)
BLOCK_BIAS
  scores = Cast <to = 1> (scores_any)
CAPPED
                  masked = Add (capped, bias){LIFT}
                  weights_float = Softmax <axis = -1> (lifted_scores)
                  weights = CastLike (weights_float, scores_any)
                  weight_rows_shape = Shape (score_rows)
                  weight_rows = Reshape (weights, weight_rows_shape)
                  y_rows = MatMul (weight_rows, value_read)
                  tile_y = Reshape (y_rows, as_tile_y)
                  largest_part = ReduceMax <keepdims = 1> (weights_float, others)
                  largest_log = Log (largest_part)
                  total_log = Sub (most_score, largest_log)
                  tile_log = Squeeze (total_log, others)
                }},
                num_scan_inputs = 2
              > (query_own, block_own)
            }},
            num_scan_inputs = 3
          > (q_of, query_of, block_of)
        }},
        num_scan_inputs = 6
      > (key_heads, value_heads, place_heads, q_members, query_tiles, block_tiles)"""

# what a query sees inside of a block: from a table [c, c], or compared where a block's own pattern
# may end in it
_PAST = {
    "\nBLOCK_ONCE": """
      c_last = Sub (c_short, one_short)
      inside_column = Unsqueeze (inside_r, axis_1)
      is_past_of = LessOrEqual (inside_r, inside_column)
      bias_of = Where (is_past_of, shown_score, hidden_score)""",
    "\nBLOCK_BIAS": """
                  ago_any = Sub (place_tile, row_from)
                  ago = Clip (ago_any, none_short, c_last)
                  bias_any = Gather (bias_of, ago)
                  bias = Unsqueeze (bias_any, axis_1)""",
}
_NEAR = {
    "\nBLOCK_ONCE": """
      axes_12r = Constant <value_ints = [1, 2]> ()
      reach_in = Min (reach, room)
      reach_short = Cast <to = 6> (reach_in)""",
    "\nBLOCK_BIAS": """
                  place_t1 = Unsqueeze (place_tile, axes_12r)
                  is_past = LessOrEqual (row_any, place_t1)
                  row_end = Add (row_any, reach_short)
                  is_near = Less (place_t1, row_end)
                  visible = And (is_past, is_near)
MANY_BIAS""",
}

#: the parts of every query
_MERGED = """
      as_log_parts = Concat <axis = 0> (batch_1, choosers, others)
      log_parts = Reshape (log_tiles, as_log_parts)
      as_y_parts = Concat <axis = 0> (batch_1, choosers, others, e_r)
      y_parts = Reshape (y_tiles, as_y_parts)
      slot_last = Sub (slots, one)
      slot_in = Min (slot_4, slot_last)
      slot_5 = Unsqueeze (slot_in, axis_3r)
      j_of = Squeeze (j_1, axis_0)
      member_j = Range (zero, j_of, one)
      member_j1 = Unsqueeze (member_j, axis_1)
      part_first = Mul (slot_5, j_of)
      part_at = Add (part_first, member_j1)
      part_flat = Reshape (part_at, flat_3)
      part_index = Unsqueeze (part_flat, others)
      log_picks = GatherND <batch_dims = 2> (log_parts, part_index)
      part_sizes = Shape (part_at)
      log_5 = Reshape (log_picks, part_sizes)
      taken_5 = Unsqueeze (all_taken, axis_3r)
      log_shown = Where (taken_5, log_5, hidden_score)
      query_part_float = Softmax <axis = -1> (log_shown)
      query_part = CastLike (query_part_float, q)
      query_part_row = Unsqueeze (query_part, axis_4r)
      y_picks_any = GatherND <batch_dims = 2> (y_parts, part_index)
      as_y_picks = Concat <axis = 0> (part_sizes, e_r)
      y_picks = Reshape (y_picks_any, as_y_picks)
      y_by_chooser = MatMul (query_part_row, y_picks)
      as_y_groups = Concat <axis = 0> (same, same, same, j_1, e_r)
      y_groups = Reshape (y_by_chooser, as_y_groups)
      y_apart = Transpose <perm = [0, 1, 3, 2, 4]> (y_groups)
      as_y = Concat <axis = 0> (same, heads_r, n_1, e_r)
      several_y = Reshape (y_apart, as_y)"""

_ROUTED = (
    """
      heads_r = Shape <start = 1, end = 2> (q)
      d_r = Shape <start = 3, end = 4> (key)
      e_r = Shape <start = 3, end = 4> (value)
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


def in_blocks(body: str, sliding: bool) -> str:
    """The body with what a query sees inside of a block.

    Args:
        body: with lines of `routed_or`, or without.
        sliding: the block of some node may have a window of its own.
    """
    for word, lines in (_NEAR if sliding else _PAST).items():
        body = body.replace(word, lines)
    return body
