"""Lines of `window_linear_body.py` that differ where a state forgets by itself.

``left``: what is left of a row when the state that it enters is next read, 0 where it does not
enter; ``older_left``: of a row of the band that is in no state, 0 where the query does not see it
so; ``before``: the state before each chunk, ``f_now``: the queries' features as they read it.
"""

from __future__ import annotations

_DECAY = """
  heads_5 = Concat <axis = 0> (g, others, one_1, one_1)
  decay_4 = Reshape (decay, heads_5)"""

_STEP_LEFT = """
          left = Cast <to = 1> (leaves_4)
          kept = Identity (state)"""
_STEP_LEFT_DECAY = """
          after_less = Sub (after_1, one)
          left_for = Sub (after_less, read_place)
          left_4 = Unsqueeze (left_for, axes_124)
          left_float = Cast <to = 1> (left_4)
          left_log = Mul (left_float, decay_4)
          left_any = Exp (left_log)
          left = Where (leaves_4, left_any, nothing)
          axes_1234 = Constant <value_ints = [1, 2, 3, 4]> ()
          moved_5 = Unsqueeze (moved_b, axes_1234)
          moved_float = Cast <to = 1> (moved_5)
          moved_log = Mul (moved_float, decay_4)
          moved_left = Exp (moved_log)
          kept = Mul (state, moved_left)"""
_STEP_FAR = """
      far = Identity (far_any)"""
_STEP_FAR_DECAY = """
      past_after = Sub (place_b, after_b)
      apart_any = Add (past_after, one)
      apart = Max (apart_any, zero)
      axes_123 = Constant <value_ints = [1, 2, 3]> ()
      apart_4 = Unsqueeze (apart, axes_123)
      apart_float = Cast <to = 1> (apart_4)
      decay_shape = Concat <axis = 0> (s, one_1, one_1)
      decay_3 = Reshape (decay, decay_shape)
      apart_log = Mul (apart_float, decay_3)
      apart_left = Exp (apart_log)
      far = Mul (far_any, apart_left)"""
_CHUNK_LEFT = """
      left = Cast <to = 1> (leaves_4)
      older_left = Cast <to = 1> (is_older)"""
_CHUNK_LEFT_DECAY = """
      next_less = Sub (bound_next_1, one)
      left_for = Sub (next_less, row_place)
      left_4 = Unsqueeze (left_for, axes_125)
      left_float = Cast <to = 1> (left_4)
      decay_5 = Unsqueeze (decay_4, axis_4)
      left_log = Mul (left_float, decay_5)
      left_any = Exp (left_log)
      left = Where (leaves_4, left_any, nothing)
      older_for = Sub (query_place_1, row_place_1)
      older_5 = Unsqueeze (older_for, axes_12)
      older_float = Cast <to = 1> (older_5)
      older_log = Mul (older_float, decay_5)
      older_any = Exp (older_log)
      older_left = Where (is_older, older_any, nothing)"""
_CHUNK_STATES = """
      three = Constant <value_int = 3> ()
      running = CumSum <exclusive = 1> (given, three)
      state_1 = Unsqueeze (state, axis_3)
      before = Add (running, state_1)
      all_given = ReduceSum <keepdims = 0> (given, axis_3)
      state_after = Add (state, all_given)"""
_CHUNK_NOW = """
      f_now = Identity (f_cut)"""
_CHUNK_STATES_DECAY = """
      bound_row = Unsqueeze (bound, axis_2)
      bound_column = Unsqueeze (bound_next, axis_1)
      since_any = Sub (bound_row, bound_column)
      since_4 = Unsqueeze (since_any, axes_12)
      since_float = Cast <to = 1> (since_4)
      since_log = Mul (since_float, decay_4)
      since_exp = Exp (since_log)
      edge_1 = Unsqueeze (edge, axis_1)
      is_before = Less (chunk, edge_1)
      since = Where (is_before, since_exp, nothing)
      flat = Concat <axis = 0> (same, g, same, count_1, others)
      given_flat = Reshape (given, flat)
      older_flat = MatMul (since, given_flat)
      older_shape = Concat <axis = 0> (same, g, others, count_2, f, columns)
      running = Reshape (older_flat, older_shape)
      bound_0 = Slice (bound, same, one_1, axis_1)
      gone = Sub (bound, bound_0)
      axes_1245 = Constant <value_ints = [1, 2, 4, 5]> ()
      gone_5 = Unsqueeze (gone, axes_1245)
      gone_float = Cast <to = 1> (gone_5)
      gone_log = Mul (gone_float, decay_5)
      gone_left = Exp (gone_log)
      state_1 = Unsqueeze (state, axis_3)
      state_left = Mul (state_1, gone_left)
      states = Add (running, state_left)
      before = Slice (states, same, count_1, axis_3)
      state_last = Slice (states, count_1, count_2, axis_3)
      state_after = Squeeze (state_last, axis_3)"""
_CHUNK_NOW_DECAY = """
      now_any = Sub (query_place, bound_now_1)
      now_one = Add (now_any, one)
      now = Max (now_one, zero)
      now_4 = Unsqueeze (now, axes_125)
      now_float = Cast <to = 1> (now_4)
      now_log = Mul (now_float, decay_5)
      now_left = Exp (now_log)
      f_now = Mul (f_cut, now_left)"""

#: word in the body -> its lines without decays, and with them
WORDS = {
    "DECAY": ("", _DECAY),
    "STEP_LEFT": (_STEP_LEFT, _STEP_LEFT_DECAY),
    "STEP_FAR": (_STEP_FAR, _STEP_FAR_DECAY),
    "CHUNK_LEFT": (_CHUNK_LEFT, _CHUNK_LEFT_DECAY),
    "CHUNK_STATES": (_CHUNK_STATES, _CHUNK_STATES_DECAY),
    "CHUNK_NOW": (_CHUNK_NOW, _CHUNK_NOW_DECAY),
}
