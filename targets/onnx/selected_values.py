"""Choosing tokens by a trained score of their values, in ONNX's textual syntax: DMA.

The meaning is that of `reattend.mixers.selecting.values`. Units are tokens from the last row of the
state to the first: of equal scores the later token is the better one, and TopK takes the first.
Letters: B rows, G KV heads, N new tokens, C capacity, f numbers of the values of all KV heads.
"""

from __future__ import annotations

SCORED = """
  value_beside = Transpose <perm = [0, 2, 1, 3]> (new_value)
  as_flat = Concat <axis = 0> (same, same, others)
  value_flat = Reshape (value_beside, as_flat)
  value_float = Cast <to = 1> (value_flat)
  rate_float = Cast <to = 1> (rate)
  rate_t = Transpose <perm = [1, 0]> (rate_float)
  value_rates = MatMul (value_float, rate_t)
  value_soft = Softplus (value_rates)
  gain_float = Cast <to = 1> (gain)
  value_scores = Mul (value_soft, gain_float)
  score_beside = Transpose <perm = [0, 2, 1]> (value_scores)
  new_score_float = Unsqueeze (score_beside, others)
  new_score = CastLike (new_score_float, past_score)
  present_score = TensorScatter <axis = 2> (past_score, new_score, write)

  back_1 = Constant <value_ints = [-1]> ()
  before_first = Constant <value_ints = [-9223372036854775807]> ()
  score_turned = Slice (present_score, back_1, before_first, axis_2, back_1)
  rank_any = Transpose <perm = [0, 1, 3, 2]> (score_turned)
  rank_scores = Cast <to = 1> (rank_any)
  minus_one = Constant <value_int = -1> ()
  number = Range (last_row, minus_one, minus_one)
  unit_apart = Sub (place, number)
  unit_past = Greater (unit_apart, zero)
  unit_near = Less (unit_apart, reach)
  candidate = And (unit_past, unit_near)
  forced = Constant <value_int = 1> ()
RANK"""
PICK_OF_SCORED = """
      pick = Sub (last_row, order)
      picked = Identity (taken)"""
MASK_OF_SCORED = """
      axis_3_last = Constant <value_ints = [3]> ()
      none = Less (ranked, ranked)
      by_unit = ScatterElements <axis = 3> (none, order, taken)
      by_token = Slice (by_unit, back_1, before_first, axis_3_last, back_1)
      chosen = Slice (by_token, same, total_1, axis_3_last)"""
