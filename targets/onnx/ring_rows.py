"""Rows [kept | ring | new] of a call of several tokens, in ONNX's textual syntax.

Kept rows stand in the order of their times; token t of the batch, padding counted, stands in the
ring at t mod W. What stands where follows from how many tokens there were. Letters: B texts, K kept
rows, W rows of the ring, N tokens of the call.
"""

from __future__ import annotations

#: times of the call's tokens and, before it, of the ring's rows; positions new_j and ring_place
PLACES = """
      past = Sub (total, n_p)
      nowhere = Constant <value: tensor = int32 {-1073741824}> ()
      past_last = Sub (past, p1)
      ring_turned = Sub (past_last, slot)
      ring_behind = Mod (ring_turned, w)
      ring_time = Sub (past_last, ring_behind)
      ring_place = Sub (ring_time, start_b1)
      new_time = Range (past, total, p1)
      new_j = Sub (new_time, start_b1)"""

#: both states behind the call, of rows_key and rows_value: next_ring_key, next_ring_value,
#: next_kept_key, next_kept_value. kept_time [B, K]: of the tokens that are to stand there, those of
#: them that are real is_place, and that stand there is_before
NEXT = """
      ring_next = Sub (newest, behind)
      ring_is_new = GreaterOrEqual (ring_next, past)
      held_rows = Add (k, w)
      new_row_0 = Sub (held_rows, past)
      ring_new_row = Add (ring_next, new_row_0)
      ring_old_row = Add (slot, k)
      ring_row = Where (ring_is_new, ring_new_row, ring_old_row)
      next_ring_key = Gather <axis = 2> (rows_key, ring_row)
      next_ring_value = Gather <axis = 2> (rows_value, ring_row)
      is_not_later = Less (kept_time, total)
      is_since = Not (is_before)
      is_in_call = And (is_not_later, is_since)
      kept_is_new = And (is_in_call, is_place)
      kept_new_row = Add (kept_time, new_row_0)
      kept_row = Where (kept_is_new, kept_new_row, kept_slot)
      kept_row_int = Cast <to = 7> (kept_row)
      axes_13 = Constant <value_ints = [1, 3]> ()
      kept_index_b = Unsqueeze (kept_row_int, axes_13)
      texts_heads = Shape <start = 0, end = 2> (key)
      one_1d = Constant <value_ints = [1]> ()
      kept_1 = Shape (kept_slot)
      as_index = Concat <axis = 0> (texts_heads, kept_1, one_1d)
      kept_index = Expand (kept_index_b, as_index)
      next_kept_key = GatherND <batch_dims = 2> (rows_key, kept_index)
      next_kept_value = GatherND <batch_dims = 2> (rows_value, kept_index)"""
