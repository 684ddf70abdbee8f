"""The body of `SparseAttention` in ONNX's textual syntax: sinks and a window, standard operators.

Its state is of bounded size: rows 0..sinks-1 hold the first tokens of each sequence, the `window`
rows behind them are a ring, in which token t of the batch (padding counted, so that all rows of the
batch agree) stands at t mod window. One new token is written first and then attends to the whole
state. Several attend in chunks of at most `window` queries to [sinks | the `window` tokens before
the chunk | the chunk]: N (sinks + 2 window) products and not N^2, however long the text is. A sink
inside the window counts once, as sink.

What a state receives is computed from a copy (`rows_key`, `rows_value`) of all that is read of it:
both may be one buffer, and a runtime knows only what depends on what.

Positions count from the first real token; a row of padding gets finite numbers that mean nothing.
`kv_len` is the same for every row of a batch, as wherever padding stands on the left.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import finished, one_token

_SPARSE = """SparseAttention
<scale: float, window: int, sinks: int = 0, sliding_window: int = 0, softcap: float = 0.0>
(q, key, value, past_key, past_value, kv_start, kv_len) => (y, present_key, present_value)
{
COMMON
  axes_12 = Constant <value_ints = [1, 2]> ()
  axes_13 = Constant <value_ints = [1, 3]> ()
  w = Constant <value_int: int = @window> ()
  s = Constant <value_int: int = @sinks> ()
  s_1 = Unsqueeze (s, axis_0)
  size = Add (s, w)
  sink = Range (zero, s, one)
  total = Gather (lengths, zero)
  newest = Sub (total, one)
  turn = Mod (newest, w)
  is_step = Equal (n, one)
  y, present_key, present_value = If (is_step) <
    then_branch = step () => (step_y, step_key, step_value)
    {
      place_b = Sub (newest, start)
      to_sinks = Less (place_b, s)
      at_sink = Max (place_b, zero)
      at_ring = Add (s, turn)
      at = Where (to_sinks, at_sink, at_ring)
      step_key = TensorScatter <axis = 2> (past_key, key, at)
      step_value = TensorScatter <axis = 2> (past_value, value, at)
      slot = Range (zero, size, one)
      ring_slot = Sub (slot, s)
      turned = Sub (turn, ring_slot)
      behind = Mod (turned, w)
      place = Unsqueeze (place_b, axis_1)
      ring_place = Sub (place, behind)
      is_in_ring = GreaterOrEqual (ring_place, s)
      is_sink = Less (slot, s)
      is_ring = Not (is_sink)
      ring_seen = And (is_ring, is_in_ring)
      ago = Sub (place, slot)
      is_past = GreaterOrEqual (ago, zero)
      is_near = Less (ago, reach)
      is_sink_past = And (is_sink, is_past)
      sink_seen = And (is_sink_past, is_near)
      seen = Or (sink_seen, ring_seen)
      visible = Unsqueeze (seen, axes_12)
ONE_TOKEN
    },
    else_branch = chunks () => (chunks_y, chunks_key, chunks_value)
    {
      past = Sub (total, n)
      last = Sub (n, one)
      c = Min (n, w)
      c_less = Sub (c, one)
      n_up = Add (n, c_less)
      chunks_n = Div (n_up, c)
      several = Greater (chunks_n, one)
      held = Min (w, past)
      b = Where (several, w, held)
      first_b = Sub (past, start)
      first = Unsqueeze (first_b, axis_1)
      sink_new = Sub (sink, first)
      sink_new_b1 = Unsqueeze (sink_new, axes_13)
      is_old = Less (sink_new_b1, zero)
      sink_at = Clip (sink_new_b1, zero, last)
      batch_heads = Shape <start = 0, end = 2> (key)
      d = Shape <start = 3, end = 4> (key)
      e = Shape <start = 3, end = 4> (value)
      sink_key_shape = Concat <axis = 0> (batch_heads, s_1, d)
      sink_value_shape = Concat <axis = 0> (batch_heads, s_1, e)
      sink_key_at = Expand (sink_at, sink_key_shape)
      sink_value_at = Expand (sink_at, sink_value_shape)
      sink_key_new = GatherElements <axis = 2> (key, sink_key_at)
      sink_value_new = GatherElements <axis = 2> (value, sink_value_at)
      size_1 = Unsqueeze (size, axis_0)
      sink_key_old = Slice (past_key, same, s_1, axis_2)
      sink_value_old = Slice (past_value, same, s_1, axis_2)
      ring_key = Slice (past_key, s_1, size_1, axis_2)
      ring_value = Slice (past_value, s_1, size_1, axis_2)
      sink_key = Where (is_old, sink_key_old, sink_key_new)
      sink_value = Where (is_old, sink_value_old, sink_value_new)
      rows_key = Concat <axis = 2> (sink_key, ring_key, key)
      rows_value = Concat <axis = 2> (sink_value, ring_value, value)

      span = Add (b, c)
      reads = Range (zero, span, one)
      chunk = Range (zero, chunks_n, one)
      chunk_first = Mul (chunk, c)
      chunk_1 = Unsqueeze (chunk_first, axis_1)
      begin = Sub (past, b)
      reads_from = Add (chunk_1, begin)
      read_time = Add (reads_from, reads)
      read_new = Sub (read_time, past)
      is_new = GreaterOrEqual (read_new, zero)
      read_new_ok = Min (read_new, last)
      read_new_row = Add (read_new_ok, size)
      read_turn = Mod (read_time, w)
      read_old_row = Add (read_turn, s)
      read_row = Where (is_new, read_new_row, read_old_row)
      chunks_1 = Unsqueeze (chunks_n, axis_0)
      sinks_shape = Concat <axis = 0> (chunks_1, s_1)
      sink_rows = Expand (sink, sinks_shape)
      chunk_rows = Concat <axis = 1> (sink_rows, read_row)
      chunk_key = Gather <axis = 2> (rows_key, chunk_rows)
      chunk_value = Gather <axis = 2> (rows_value, chunk_rows)

      query = Range (zero, c, one)
      query_1 = Unsqueeze (query, axis_1)
      query_index = Add (chunk_1, query)
      query_row = Min (query_index, last)
      query_time = Add (query_index, past)
      query_b = Add (query_1, b)
      apart = Sub (query_b, reads)
      is_before = GreaterOrEqual (apart, zero)
      is_close = Less (apart, w)
      in_window = And (is_before, is_close)
      start_b11 = Unsqueeze (start, axes_12)
      read_place = Sub (read_time, start_b11)
      is_no_sink = GreaterOrEqual (read_place, s)
      read_seen = Unsqueeze (is_no_sink, axis_2)
      near_seen = And (read_seen, in_window)
      query_place = Sub (query_time, start_b11)
      others_last = Unsqueeze (query_place, others)
      ago = Sub (others_last, sink)
      is_past = GreaterOrEqual (ago, zero)
      is_near = Less (ago, reach)
      sink_seen = And (is_past, is_near)
      seen = Concat <axis = 3> (sink_seen, near_seen)
      visible = Unsqueeze (seen, axes_12)

      q_chunks = Gather <axis = 2> (q, query_row)
      q_scaled = Mul (q_chunks, factor)
      chunk_sizes = Shape <start = 2> (q_scaled)
      by_group = Concat <axis = 0> (same, g, others, chunk_sizes)
      q_rows = Reshape (q_scaled, by_group)
      key_shared = Unsqueeze (chunk_key, axis_2)
      key_t = Transpose <perm = [0, 1, 2, 3, 5, 4]> (key_shared)
      scores_any = MatMul (q_rows, key_t)
MANY_WEIGHTS
      value_shared = Unsqueeze (chunk_value, axis_2)
      y_chunks = MatMul (weights, value_shared)
      heads_1 = Shape <start = 1, end = 2> (q)
      y_by_head = Concat <axis = 0> (same, heads_1, others, e)
      y_padded = Reshape (y_chunks, y_by_head)
      chunks_y = Slice (y_padded, same, n_1, axis_2)

      slot = Range (zero, w, one)
      turned = Sub (turn, slot)
      behind = Mod (turned, w)
      slot_time = Sub (newest, behind)
      slot_new = Sub (slot_time, past)
      slot_is_new = GreaterOrEqual (slot_new, zero)
      slot_from_new = Add (slot_new, size)
      slot_from_old = Add (slot, s)
      slot_row = Where (slot_is_new, slot_from_new, slot_from_old)
      state_row = Concat <axis = 0> (sink, slot_row)
      chunks_key = Gather <axis = 2> (rows_key, state_row)
      chunks_value = Gather <axis = 2> (rows_value, state_row)
    }
  >
}"""


def sparse_body(capped: bool = True) -> str:
    """`SparseAttention` without the domain's line; `capped`: some node may have a softcap."""
    body = _SPARSE.replace("\nONE_TOKEN", one_token("step_key", "step_value"))
    return finished(body, capped)
