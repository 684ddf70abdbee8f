"""The body of `WindowLinearAttention`: softmax over a window, and a state of what is older.

Its state is of bounded size. Keys and values stand in a ring of one row more than a query's window
may reach back: token t of the batch (padding counted, so that all rows of the batch agree) at t mod
the number of rows. Hence the row that a new token writes is never one that still has to go into
`past_state`, and a step may read and write in any order. Places count from the first real token:
windows (terraces too) begin elsewhere in every row of the batch, so what enters the state is chosen
by weights of 0 and 1.

Several tokens are cut into chunks of C queries, each with the rows of the ring's length before it:
what no query of the chunk sees in its window comes from the state before the chunk, what some see
and some do not are products under a mask. y is not divided: its last column is the sum to divide
by.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reattend.targets.onnx.linear_body import CUT, SIZES
from reattend.targets.onnx.linear_decay import WORDS
from reattend.targets.onnx.linear_features import feature_lines
from reattend.targets.onnx.window_linear_chunks import CHUNKS

_WINDOW = """WindowLinearAttention
<scale: float, window: int, chunk: int, feature_map: int, terraced: int = 0, decays: int = 0>
(q, features, key, value, past_key, past_value, past_state, mix, weight, bias, decay, kv_start,
kv_len) => (y, present_key, present_value, present_state)
{
SIZES
  scale_float = Constant <value_float: float = @scale> ()
  hidden = Constant <value_float = -1.0e38> ()
  last_axis = Constant <value_ints = [-1]> ()
  axis_4 = Constant <value_ints = [4]> ()
  axes_12 = Constant <value_ints = [1, 2]> ()
  axes_124 = Constant <value_ints = [1, 2, 4]> ()
  axes_125 = Constant <value_ints = [1, 2, 5]> ()
  w = Constant <value_int: int = @window> ()
  w_less = Sub (w, one)
  feature_kind = Constant <value_int: int = @feature_map> ()
  terraced_int = Constant <value_int: int = @terraced> ()
  is_terraced = Greater (terraced_int, zero)
  start = Cast <to = 7> (kv_start)
  start_1 = Unsqueeze (start, axis_1)
  lengths = Cast <to = 7> (kv_len)
  total = Gather (lengths, zero)
  newest = Sub (total, one)
  g = Shape <start = 1, end = 2> (key)
  s = Shape <start = 1, end = 2> (past_state)
  f = Shape <start = 2, end = 3> (past_state)
  columns = Shape <start = 3, end = 4> (past_state)
  ring_1 = Shape <start = 2, end = 3> (past_key)
  ring = Squeeze (ring_1, axis_0)
  slot = Range (zero, ring, one)
  turned = Sub (newest, slot)
  behind = Mod (turned, ring)
  slot_time = Sub (newest, behind)
  by_group = Concat <axis = 0> (same, g, others, f, columns)
  state = Reshape (past_state, by_group)
  state_shape = Concat <axis = 0> (same, s, f, columns)
  heads_4 = Concat <axis = 0> (g, others, one_1, one_1)
  mix_4 = Reshape (mix, heads_4)
DECAY
  is_step = Equal (n, one)
  y, present_key, present_value, present_state = If (is_step) <
    then_branch = step () => (step_y, step_key, step_value, step_state)
    {
      place_b = Sub (newest, start)
      LOW after_b place_b
      earlier_b = Sub (place_b, one)
      earlier = Sub (newest, one)
      LOW before_b earlier_b
      moved_b = Sub (after_b, before_b)
      most = ReduceMax <keepdims = 0> (moved_b)
      some = Greater (most, zero)
      state_now = If (some) <
        then_branch = leaving () => (state_moved)
        {
          read = If (is_terraced) <
            then_branch = anywhere () => (all_slots)
            {
              all_slots = Identity (slot)
            },
            else_branch = oldest () => (one_slot)
            {
              oldest_time = Sub (newest, w)
              oldest_at = Mod (oldest_time, ring)
              one_slot = Unsqueeze (oldest_at, axis_0)
            }
          >
          read_turned = Sub (earlier, read)
          read_behind = Mod (read_turned, ring)
          read_time = Sub (earlier, read_behind)
          read_place = Sub (read_time, start_1)
          before_1 = Unsqueeze (before_b, axis_1)
          after_1 = Unsqueeze (after_b, axis_1)
          is_new = GreaterOrEqual (read_place, before_1)
          is_old = Less (read_place, after_1)
          leaves = And (is_new, is_old)
          leaves_4 = Unsqueeze (leaves, axes_124)
          key_read = Gather <axis = 2> (past_key, read)
          value_read = Gather <axis = 2> (past_value, read)
          raw = Unsqueeze (key_read, axis_2)
          value_raw = Unsqueeze (value_read, axis_2)
FEATURES
STEP_LEFT
          mapped_left = Mul (mapped, left)
          mapped_t = Transpose <perm = [0, 1, 2, 4, 3]> (mapped_left)
          given_values = MatMul (mapped_t, value_raw)
          given_ones = ReduceSum <keepdims = 1> (mapped_t, last_axis)
          given = Concat <axis = -1> (given_values, given_ones)
          state_moved = Add (kept, given)
        },
        else_branch = nothing_leaves () => (state_still)
        {
          state_still = Identity (state)
        }
      >
      step_state = Reshape (state_now, state_shape)
      at = Mod (newest, ring)
      at_1 = Unsqueeze (at, axis_0)
      batch = Shape <start = 0, end = 1> (q)
      at_b = Expand (at_1, batch)
      step_key = TensorScatter <axis = 2> (past_key, key, at_b)
      step_value = TensorScatter <axis = 2> (past_value, value, at_b)
      slot_place = Sub (slot_time, start_1)
      first_1 = Unsqueeze (after_b, axis_1)
      seen = GreaterOrEqual (slot_place, first_1)
      visible = Unsqueeze (seen, axes_12)
      rows_by_group = Concat <axis = 0> (same, g, others, same)
      q_scaled = Mul (q, scale_float)
      q_rows = Reshape (q_scaled, rows_by_group)
      key_t = Transpose <perm = [0, 1, 3, 2]> (step_key)
      scores = MatMul (q_rows, key_t)
      shown = Where (visible, scores, hidden)
      top = ReduceMax <keepdims = 1> (shown, last_axis)
      less = Sub (shown, top)
      p = Exp (less)
      mix_3 = Squeeze (mix_4, axis_3)
      p_mixed = Mul (p, mix_3)
      near_values = MatMul (p_mixed, step_value)
      near_ones = ReduceSum <keepdims = 1> (p_mixed, last_axis)
      near = Concat <axis = -1> (near_values, near_ones)
      by_head = Concat <axis = 0> (same, others, one_1, columns)
      near_y = Reshape (near, by_head)
      rows_by_state = Concat <axis = 0> (same, s, others, f)
      features_rows = Reshape (features, rows_by_state)
      far_any = MatMul (features_rows, step_state)
STEP_FAR
      far_y = Reshape (far, by_head)
      step_y = Add (near_y, far_y)
    },
    else_branch = chunks () => (chunks_y, chunks_key, chunks_value, chunks_state)
    {
CHUNKS
    }
  >
}"""


def _low(place: str, name: str) -> str:
    """Lines: the first place that a query at `place` sees in its window."""
    return f"""
      {name}_real = Max ({place}, zero)
      {name}_terrace = Div ({name}_real, w)
      {name}_begin = Mul ({name}_terrace, w)
      {name}_terraced = Sub ({name}_begin, w)
      {name}_sliding = Sub ({name}_real, w_less)
      {name}_any = Where (is_terraced, {name}_terraced, {name}_sliding)
      {name} = Max ({name}_any, zero)"""


def window_linear_body(decayed: bool, maps: Sequence[str]) -> str:
    """`WindowLinearAttention` without the domain's line.

    Args:
        decayed: some node has decays; else that input is not read.
        maps: feature maps that some node has.
    """
    body = _WINDOW.replace("\nCHUNKS", CHUNKS).replace("\nCUT", CUT)
    for word, forms in WORDS.items():
        body = body.replace(f"\n{word}\n", f"{forms[decayed]}\n")
    body = body.replace("\nFEATURES", feature_lines(maps)).replace("\nSIZES", SIZES)
    return re.sub(r"\n *LOW (\w+) (\w+)", lambda found: _low(found[2], found[1]), body)
