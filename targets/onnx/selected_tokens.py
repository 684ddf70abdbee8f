"""Choosing single tokens while decoding, in ONNX's textual syntax: by labels, by what was noted.

The meaning is that of `reattend.mixers.selecting.channels` and `.recorded`. Letters: B rows, G KV
heads, N new tokens, r channels of a label, K tokens.
"""

from __future__ import annotations

#: every key, for several tokens
EVERY = """
      chosen = Equal (place, place)"""

# Double Sparsity: a few channels of every key beside it
LABELS = """
  axes_02 = Constant <value_ints = [0, 2]> ()
  batch_1 = Shape <start = 0, end = 1> (key)
  channels_1 = Unsqueeze (channels, axes_02)
  by_new = Concat <axis = 0> (batch_1, one_1, n_1, one_1)
  new_channels = Expand (channels_1, by_new)
  new_label = GatherElements <axis = 3> (new_key, new_channels)
  present_label = TensorScatter <axis = 2> (past_label, new_label, write)"""
BY_LABEL = """
  as_group = Concat <axis = 0> (same, g, others, same)
  q_group = Reshape (q, as_group)
  q_many = Shape <start = 2, end = 3> (q_group)
  by_query = Concat <axis = 0> (batch_1, one_1, q_many, one_1)
  q_channels = Expand (channels_1, by_query)
  q_label = GatherElements <axis = 3> (q_group, q_channels)
  q_short = Mul (q_label, factor)
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
PICK_OF_TOKENS = """
      pick = Identity (order)
      picked = Identity (taken)"""
MASK_OF_TOKENS = """
      axis_3_last = Constant <value_ints = [3]> ()
      none = Less (ranked, ranked)
      by_token = ScatterElements <axis = 3> (none, order, taken)
      chosen = Slice (by_token, same, total_1, axis_3_last)"""

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
      note_q = Reshape (q, note_group)
      note_q_scaled = Mul (note_q, factor)
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
