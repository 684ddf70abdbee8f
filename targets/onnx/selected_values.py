"""Choosing tokens by a trained score of their values, in ONNX's textual syntax: DMA.

The meaning is that of `reattend.mixers.selecting.values`. Units are tokens from the last one to the
first: of equal scores the later token is the better one, and TopK takes the first; scores go in the
steps of float16, because equal values must have equal scores in every call. One token ranks
and gathers for itself. Several do in regions, as scores know no query: what c neighbours choose
are the best tokens, but for those that not all of them see. Letters: B rows, G KV heads, N new
tokens, C capacity, f numbers of the values of all KV heads, R regions, c queries of each, K rows
that it reads, D of them that some of its queries do not see.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import RUNS
from reattend.targets.onnx.selected_regions import listed_regions

SCORED = """
  value_beside = Transpose <perm = [0, 2, 1, 3]> (new_value)
  as_flat = Concat <axis = 0> (same, same, others)
  value_rows = Reshape (value_beside, as_flat)
  value_float = Cast <to = 1> (value_rows)
  rate_float = Cast <to = 1> (rate)
  rate_t = Transpose <perm = [1, 0]> (rate_float)
  value_rates = MatMul (value_float, rate_t)
  value_soft = Softplus (value_rates)
  gain_float = Cast <to = 1> (gain)
  value_scores = Mul (value_soft, gain_float)
  step_most = Constant <value_float = 65504.0> ()
  step_least = Neg (step_most)
  score_held = Clip (value_scores, step_least, step_most)
  score_short = Cast <to = 10> (score_held)
  score_steps = Cast <to = 1> (score_short)
  score_beside = Transpose <perm = [0, 2, 1]> (score_steps)
  new_score_float = Unsqueeze (score_beside, others)
  new_score = CastLike (new_score_float, past_score)
  present_score = TensorScatter <axis = 2> (past_score, new_score, write)

  back_1 = Constant <value_ints = [-1]> ()
  before_first = Constant <value_ints = [-9223372036854775807]> ()
  minus_one = Constant <value_int = -1> ()
  forced = Constant <value_int = 1> ()"""

PICK_OF_SCORED = """
      score_turned = Slice (present_score, back_1, before_first, axis_2, back_1)
      rank_any = Transpose <perm = [0, 1, 3, 2]> (score_turned)
      rank_scores = Cast <to = 1> (rank_any)
      number = Range (last_row, minus_one, minus_one)
      unit_apart = Sub (place, number)
      unit_past = Greater (unit_apart, zero)
      unit_near = Less (unit_apart, reach)
      candidate = And (unit_past, unit_near)
RANK
      pick = Sub (last_row, order)
      picked = Identity (taken)"""

# Of the best tokens in their order, listed [B, G, R, K], every query has chosen those that it sees
# and that stand before a bound of its own: so many as it may choose, and as many more as stand
# before it and it does not see. Such are only tokens of the region itself, and those that fall out
# of a block's own reach inside of it.
_LISTED = """
      axis_end = Constant <value_ints = [-1]> ()
      place_run = Gather <axis = 1> (place_bn, run_at)
      as_place_run = Concat <axis = 0> (same, runs_1, run_c_1)
      place_brc = Reshape (place_run, as_place_run)
      place_region = Unsqueeze (place_brc, axis_1)
      first_place = ReduceMin <keepdims = 1> (place_region, axis_end)
      last_place = ReduceMax <keepdims = 1> (place_region, axis_end)
      first_reached = Sub (first_place, reach)
      last_reached = Sub (last_place, reach)
      seen_many = Add (place_region, one)
      free = Min (seen_many, reach)
BUDGET
      wanted_units = Sub (count, forced)

      total = Gather (lengths, zero)
      total_1 = Unsqueeze (total, axis_0)
      score_used = Slice (present_score, same, total_1, axis_2)
      score_turned = Slice (score_used, back_1, before_first, axis_2, back_1)
      rank_any = Transpose <perm = [0, 1, 3, 2]> (score_turned)
      rank_scores = Cast <to = 1> (rank_any)
      total_less = Sub (total, one)
      number = Range (total_less, minus_one, minus_one)
      unit_past = Less (number, last_place)
      unit_near = Greater (number, first_reached)
      candidate = And (unit_past, unit_near)
      barely = Constant <value_float = -0.9e38> ()
      ranked = Where (candidate, rank_scores, hidden_score)
      most_wanted = ReduceMax <keepdims = 0> (wanted_units)
      run_twice = Add (run_c, run_c)
      unsure_most = Where (is_own, run_twice, run_c)
      listed_any = Add (most_wanted, unsure_most)
      listed_many = Min (listed_any, total)
      listed_1 = Unsqueeze (listed_many, axis_0)
      best, order = TopK <axis = 3, largest = 1, sorted = 1> (ranked, listed_1)
      is_listed = Greater (best, barely)
      listed = Sub (total_less, order)

      is_own_token = GreaterOrEqual (listed, first_place)
      is_leaving = LessOrEqual (listed, last_reached)
      is_either = Or (is_own_token, is_leaving)
      is_unsure = And (is_listed, is_either)
      standing = Range (zero, listed_many, one)
      standing_float = Cast <to = 1> (standing)
      standing_back = Neg (standing_float)
      unsure_rank = Where (is_unsure, standing_back, hidden_score)
      unsure_many = Min (unsure_most, listed_many)
      unsure_1 = Unsqueeze (unsure_many, axis_0)
      unsure_best, unsure_at = TopK <axis = 3, largest = 1, sorted = 1> (unsure_rank, unsure_1)
      unsure_real = Greater (unsure_best, barely)
      unsure_token = GatherElements <axis = 3> (listed, unsure_at)
      axis_3 = Constant <value_ints = [3]> ()
      four = Constant <value_int = 4> ()
      place_c1 = Unsqueeze (place_region, axis_end)
      token_1k = Unsqueeze (unsure_token, axis_3)
      real_1k = Unsqueeze (unsure_real, axis_3)
      at_1k = Unsqueeze (unsure_at, axis_3)
      reached_c1 = Sub (place_c1, reach)
      is_later = GreaterOrEqual (token_1k, place_c1)
      is_gone = LessOrEqual (token_1k, reached_c1)
      is_not_seen = Or (is_later, is_gone)
      not_seen = And (is_not_seen, real_1k)
      not_seen_int = Cast <to = 7> (not_seen)
      not_seen_before = CumSum <exclusive = 1> (not_seen_int, four)
      seen_before = Sub (at_1k, not_seen_before)
      wanted_c1 = Unsqueeze (wanted_units, axis_end)
      is_before = Less (seen_before, wanted_c1)
      is_skipped = And (is_before, not_seen)
      skipped_int = Cast <to = 7> (is_skipped)
      skipped_many = ReduceSum <keepdims = 1> (skipped_int, axis_end)
      bound = Add (wanted_c1, skipped_many)"""

# rows [B, G, R, K] with the first and one past the last query that may see each, and where they
# stand: those of sinks and windows before every bound
_READ = f"""
      no_row = Mul (listed, zero)
      no_one = Slice (no_row, same, one_1, axis_3)
      sink = Range (zero, sinks_int, one)
      sink_row = Add (no_one, sink)
      sink_begin = Add (sink_row, w)
      sink_end = Add (sink_row, reach)
      w_less = Sub (w, one)
      window_many = Add (run_c, w_less)
      window_number = Range (zero, window_many, one)
      window_from = Sub (first_place, w_less)
      window_any = Add (window_from, window_number)
      window_row = Add (window_any, no_one)
      window_real = GreaterOrEqual (window_row, zero)
      window_begin = Where (window_real, window_row, endless)
      window_reach = Min (w, reach)
      window_end = Add (window_row, window_reach)
      pick_late = GreaterOrEqual (listed, sinks_int)
      pick_real = And (pick_late, is_listed)
      pick_after = Add (listed, w)
      pick_begin = Where (pick_real, pick_after, endless)
      pick_end = Add (listed, reach)
      rows_listed = Concat <axis = 3> (sink_row, window_row, listed)
      rows_begin = Concat <axis = 3> (sink_begin, window_begin, pick_begin)
      rows_end = Concat <axis = 3> (sink_end, window_end, pick_end)
      sinks_1 = Unsqueeze (sinks_int, axis_0)
      window_many_1 = Unsqueeze (window_many, axis_0)
      fixed_many = Add (sinks_1, window_many_1)
      always = Expand (minus_one, fixed_many)
      rows_at = Concat <axis = 0> (always, standing)
      places = Identity (place_c1)
      run_sizes = Shape <start = 2> (q_regions)
      as_groups = Concat <axis = 0> (same, g, others, run_sizes)
      q_groups = Reshape (q_regions, as_groups)
      q_beside = Transpose <perm = [0, 1, 3, 2, 4, 5]> (q_groups)
      beside_sizes = Shape <start = 2> (q_beside)
      as_regions_q = Concat <axis = 0> (others, beside_sizes)
      regions_q = Reshape (q_beside, as_regions_q){listed_regions(bounded=True)}
      y_sizes = Shape <start = 1> (regions_y)
      as_y_groups = Concat <axis = 0> (others, g, y_sizes)
      y_groups = Reshape (regions_y, as_y_groups)
      y_apart = Transpose <perm = [0, 1, 3, 2, 4, 5]> (y_groups)
      heads_1 = Shape <start = 1, end = 2> (q)
      as_y = Concat <axis = 0> (same, heads_1, others, value_last)
      y_flat = Reshape (y_apart, as_y)
      several_y = Slice (y_flat, same, n_1, axis_2)"""


REGIONS_OF_SCORED = f"""
      run_most = Constant <value_int = @RUN> (){RUNS}{_LISTED}{_READ}"""
