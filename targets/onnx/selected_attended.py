"""Blocks by what their own queries make of them, in ONNX's textual syntax: LongHeads.

The meaning is that of `reattend.mixers.selecting.attended`. Beside a row for every complete block,
a state holds the queries of the last c tokens: token t at slot t mod c. Letters: B rows, H query
heads, G KV heads, J queries of each, N new tokens, T blocks touched by a call, c tokens of a block.
"""

from __future__ import annotations

import re

from reattend.targets.onnx.fragments import CAPPED
from reattend.targets.onnx.selected_choice import SUMMARY

# New queries in the order of their positions, those of a KV head side by side [B, G, N, J d].
_QUERIES = """
  inverse = Constant <value_floats: floats = @inv_freq> ()
  pairs = Shape (inverse)
  pairs_twice = Add (pairs, pairs)
  axis_end = Constant <value_ints = [-1]> ()
  the_end = Constant <value_ints = [9223372036854775807]> ()
  factor_float = Cast <to = 1> (factor)
  write_1 = Unsqueeze (write, axis_1)
  is_single = Equal (n, one)
  heads_1 = Shape <start = 1, end = 2> (q)
  group_1 = Div (heads_1, g)
  by_query_head = Concat <axis = 0> (one_1, heads_1, one_1, one_1)
  q_from = Expand (from_b1n1, by_query_head)
  q_new = GatherND <batch_dims = 2> (q, q_from)
  as_q_group = Concat <axis = 0> (same, g, group_1, n_1, others)
  q_new_group = Reshape (q_new, as_q_group)
  q_new_beside = Transpose <perm = [0, 1, 3, 2, 4]> (q_new_group)
  as_recent = Concat <axis = 0> (same, same, same, others)
  new_queries = Reshape (q_new_beside, as_recent)"""

# What stands for the blocks [B, G, T, J d]: `summary_any` from `block_key`.
_ATTENDED = """
      e = Shape <start = 3, end = 4> (value)
      block_value_any = GatherND <batch_dims = 2> (present_value, block_rows)
      block_value_own = Cast <to = 1> (block_value_any)
      as_value_blocks = Concat <axis = 0> (same, g, others, c_1, e)
      block_value = Reshape (block_value_own, as_value_blocks)
      block_pool = Concat <axis = 2> (past_recent, new_queries)
      is_new_row = GreaterOrEqual (block_row_any, write_1)
      new_row = Sub (block_row_any, write_1)
      new_slot = Add (new_row, c)
      old_slot = Mod (block_row_any, c)
      slot_any = Where (is_new_row, new_slot, old_slot)
      slots = Add (c, n)
      last_slot = Sub (slots, one)
      slot = Min (slot_any, last_slot)
      slot_b1 = Unsqueeze (slot, axes_13)
      slot_rows = Expand (slot_b1, by_key_head)
      block_q_any = GatherND <batch_dims = 2> (block_pool, slot_rows)
      block_q_own = Cast <to = 1> (block_q_any)
      as_q_blocks = Concat <axis = 0> (same, g, others, c_1, group_1, d)
      block_q_6 = Reshape (block_q_own, as_q_blocks)
      block_q_heads = Transpose <perm = [0, 1, 2, 4, 3, 5]> (block_q_6)
      as_q_rows = Concat <axis = 0> (same, same, same, others, d)
      block_q = Reshape (block_q_heads, as_q_rows)
      block_q_short = Mul (block_q, factor_float)
      block_key_t = Transpose <perm = [0, 1, 2, 4, 3]> (block_key)
      inner_scores = MatMul (block_q_short, block_key_t)
CAP_INNER
      inner_weights = Softmax <axis = -1> (inner_capped)
      inner_y = MatMul (inner_weights, block_value)
      as_inner = Concat <axis = 0> (same, same, same, group_1, c_1, e)
      inner_y_6 = Reshape (inner_y, as_inner)
      axis_of_c = Constant <value_ints = [4]> ()
      inner_mean = ReduceMean <keepdims = 0> (inner_y_6, axis_of_c)
      block_begin_b1 = Unsqueeze (from_block, axis_1)
      touched_number = Range (zero, touched, one)
      block_number = Add (block_begin_b1, touched_number)
      block_begin = Mul (block_number, c)
      block_begin_float = Cast <to = 1> (block_begin)
      axes_134 = Constant <value_ints = [1, 3, 4]> ()
      block_begin_5 = Unsqueeze (block_begin_float, axes_134)
      block_angle_on = Mul (block_begin_5, inverse)
      block_angle = Neg (block_angle_on)
      block_cos = Cos (block_angle)
      block_sin = Sin (block_angle)
TURN block_key block_cos block_sin local
      outer_q = Mul (inner_mean, factor_float)
      local_t = Transpose <perm = [0, 1, 2, 4, 3]> (local)
      outer_scores = MatMul (outer_q, local_t)
CAP_OUTER
      outer_weights = Softmax <axis = -1> (outer_capped)
      outer_y = MatMul (outer_weights, local)
      summary_any = Reshape (outer_y, as_recent)"""

# The rows that the state of queries gets, and from where: one, or all c.
_RECENT = """
      BRANCH_recent, BRANCH_at = If (is_single) <
        then_branch = one_query () => (one_recent, one_at)
        {
          one_recent = Identity (new_queries)
          one_at = Mod (write, c)
        },
        else_branch = some_queries () => (all_recent, all_at)
        {
          pool = Concat <axis = 2> (past_recent, new_queries)
          held = Range (zero, c, one)
          real_b = Sub (lengths, start)
          last_real_b = Sub (real_b, one)
          last_real = Unsqueeze (last_real_b, axis_1)
          ago_any = Sub (last_real, held)
          ago = Mod (ago_any, c)
          held_place = Sub (last_real, ago)
          is_new_held = GreaterOrEqual (held_place, write_1)
          new_held = Sub (held_place, write_1)
          new_held_slot = Add (new_held, c)
          from_slot = Where (is_new_held, new_held_slot, held)
          from_slot_b1 = Unsqueeze (from_slot, axes_13)
          from_slots = Expand (from_slot_b1, by_key_head)
          all_recent = GatherND <batch_dims = 2> (pool, from_slots)
          all_at = Mul (write, zero)
        }
      >"""

#: blocks that count and are always among the chosen: the first ones, and those up to the own one
CERTAIN = """
  first_blocks = Constant <value_int: int = @first> ()
  last_blocks = Constant <value_int: int = @last> ()
  is_beginning = Less (number, first_blocks)
  blocks_back = Sub (own_block, number)
  is_ending = Less (blocks_back, last_blocks)
  is_either = Or (is_beginning, is_ending)
  certain = And (candidate, is_either)
  certain_int = Cast <to = 7> (certain)
  certain_sum = ReduceSum <keepdims = 1> (certain_int, others)
  certain_many = Add (certain_sum, forced)"""

ATTENDED_RANKS = """
  place_float = Cast <to = 1> (place)
  place_angle_on = Mul (place_float, inverse)
  place_angle = Neg (place_angle_on)
  place_cos = Cos (place_angle)
  place_sin = Sin (place_angle)
  q_own = Cast <to = 1> (q)
TURN q_own place_cos place_sin q_turned
  q_short = Mul (q_turned, factor_float)
  as_summary_heads = Concat <axis = 0> (same, same, same, group_1, others)
  summary_5 = Reshape (present_summary, as_summary_heads)
  summary_5_t = Transpose <perm = [0, 1, 3, 4, 2]> (summary_5)
  as_heads_t = Concat <axis = 0> (same, heads_1, d, many_1)
  summary_heads_any = Reshape (summary_5_t, as_heads_t)
  summary_heads = Cast <to = 1> (summary_heads_any)
  rank_scores = MatMul (q_short, summary_heads)
RANK"""


def _turned(text: str) -> str:
    """TURN x cos sin y: the lines that turn x by these angles."""
    lines = r"""
  \4_real = Slice (\1, same, pairs, axis_end)
  \4_imag = Slice (\1, pairs, pairs_twice, axis_end)
  \4_rest = Slice (\1, pairs_twice, the_end, axis_end)
  \4_rc = Mul (\4_real, \2)
  \4_is = Mul (\4_imag, \3)
  \4_rs = Mul (\4_real, \3)
  \4_ic = Mul (\4_imag, \2)
  \4_first = Sub (\4_rc, \4_is)
  \4_second = Add (\4_rs, \4_ic)
  \4 = Concat <axis = -1> (\4_first, \4_second, \4_rest)"""
    return re.sub(r"\nTURN (\w+) (\w+) (\w+) (\w+)", lines, text)


def _with_queries() -> str:
    """`SUMMARY`, beside which the state of queries is written, after it was read."""
    text = SUMMARY.replace("new_summary = If", "new_summary, new_recent, recent_at = If")
    text = "\n".join(line for line in text.splitlines() if "block_mean =" not in line)
    for branch, made in (("then", "block_summary"), ("else", "old_summary")):
        text = text.replace(f"=> ({made})", f"=> ({made}, {branch}_recent, {branch}_at)")
        last = next(line for line in text.splitlines() if line.strip().startswith(f"{made} ="))
        text = text.replace(last, last + _RECENT.replace("BRANCH", branch))
    written = "  present_recent = TensorScatter <axis = 2> (past_recent, new_recent, recent_at)"
    here = "  present_summary ="
    return text.replace(here, f"{written}\n{here}").replace("SUMMARISED", _turned(_ATTENDED)[1:])


def inner_caps(body: str, capped: bool) -> str:
    """The body with what stands for CAP_INNER and CAP_OUTER."""
    for name in ("inner", "outer"):
        plain = f"      {name}_capped = Identity ({name}_scores)"
        text = re.sub(r"\bcapped\b", f"{name}_capped", CAPPED[1:])
        text = re.sub(r"\b(then_|else_)?scores\b", rf"\1{name}_scores", text)
        body = body.replace(f"CAP_{name.upper()}", text if capped else plain)
    return body


ATTENDED = _QUERIES + _with_queries() + CERTAIN + _turned(ATTENDED_RANKS)
