"""What the heads of a node choose, in ONNX's textual syntax: scores of units, then a budget.

The meaning is that of `reattend.mixers.selecting`, a file per method there. Letters: B rows, S what
chooses (query heads, or KV heads for their queries together), N new tokens, Q units (blocks or
tokens), K units that are kept, c tokens per block.
"""

from __future__ import annotations

import re

from reattend.targets.onnx.fragments import CAPPED

#: nodes whose ranks are no products of queries and keys, which a softcap would bend
_STRAIGHT = ("GateAttention", "ValuesAttention")
#: nodes that choose some blocks in any case
_CERTAIN = ("AttendedBlocksAttention", "AnchoredBlocksAttention")
#: how many units a node keeps: exactly one is given, the others are left at these
BUDGETS = {"topk": 0, "ratio": 0.0, "topp": 0.0, "threshold": -1.0}

# From rank_scores [B, S, N, Q], candidate [B, 1, N, Q], and forced, which count and are not among
# the candidates: the best ones, order [B, S, N, K] and taken.
_RANK = """
  hidden_rank = Constant <value_float = -1.0e38> ()
  barely = Constant <value_float = -0.9e38> ()
CAP_RANKS
LIFT
  ranked = Where (candidate, lifted, hidden_rank)
  candidate_int = Cast <to = 7> (candidate)
  candidates = ReduceSum <keepdims = 1> (candidate_int, others)
  free = Add (candidates, forced)
COUNT
  wanted_units = Sub (count, forced)
  most_any = ReduceMax <keepdims = 0> (wanted_units)
  units_1 = Shape <start = 3, end = 4> (ranked)
  units = Squeeze (units_1, axis_0)
  most_in = Min (most_any, units)
  most = Max (most_in, one)
  most_1 = Unsqueeze (most, axis_0)
  best, order = TopK <axis = 3, largest = 1, sorted = 1> (ranked, most_1)
  number_k = Range (zero, most, one)
  in_budget = Less (number_k, wanted_units)
  is_candidate = Greater (best, barely)
SHARES
  taken = And (is_candidate, LAST)
"""
# of the units that are chosen in any case, too
_TAKEN = "  taken = And (is_candidate, LAST)"
_TAKEN_CERTAIN = """  taken_best = And (is_candidate, LAST)
  rank_shape = Shape (ranked)
  certain_each = Expand (certain, rank_shape)
  certain_best = GatherElements <axis = 3> (certain_each, order)
  taken = Or (taken_best, certain_best)"""

#: budgets that are a number beforehand: count [B, 1, N, 1] of each
COUNTS = {
    "topk": """
  topk_int = Constant <value_int: int = @topk> ()
  has_topk = Greater (topk_int, zero)
  count_topk = Where (has_topk, topk_int, endless)""",
    "ratio": """
  ratio_float = Constant <value_float: float = @ratio> ()
  no_ratio = Constant <value_float = 0.0> ()
  has_ratio = Greater (ratio_float, no_ratio)
  free_float = Cast <to = 1> (free)
  exact = Mul (free_float, ratio_float)
  exact_up = Ceil (exact)
  exact_int = Cast <to = 7> (exact_up)
  count_ratio = Where (has_ratio, exact_int, endless)""",
}
_PARTS = """
  parts = Softmax <axis = -1> (ranked)
  part = GatherElements <axis = 3> (parts, order)"""
_SHARES = {
    "topp": """
  topp_float = Constant <value_float: float = @topp> ()
  no_topp = Constant <value_float = 0.0> ()
  whole_float = Constant <value_float = 1.0> ()
  has_topp = Greater (topp_float, no_topp)
  is_part = Less (topp_float, whole_float)
  cuts = And (has_topp, is_part)
  is_whole = Not (cuts)
  axis_last = Constant <value_int = 3> ()
  before = CumSum <exclusive = 1> (part, axis_last)
  is_less = Less (before, topp_float)
  in_topp = Or (is_less, is_whole)""",
    "threshold": """
  threshold_float = Constant <value_float: float = @threshold> ()
  in_threshold = GreaterOrEqual (part, threshold_float)""",
}

# New rows are summarised in whole blocks: those that they are in, from their first row on, and
# blocks before them where the state ends. Nobody looks at an incomplete block's summary, so where
# no block becomes complete what was there is written again, and no key is read.
SUMMARY = """
  c = Constant <value_int: int = @block> ()
  c_1 = Unsqueeze (c, axis_0)
  d = Shape <start = 3, end = 4> (key)
  axis_3 = Constant <value_ints = [3]> ()
  many_1 = Shape <start = 2, end = 3> (past_summary)
  many = Squeeze (many_1, axis_0)
  c_less = Sub (c, one)
  n_less = Sub (n, one)
  n_more = Add (n_less, c_less)
  n_blocks = Div (n_more, c)
  touched_any = Add (n_blocks, one)
  touched = Min (touched_any, many)
  latest_start = Sub (many, touched)
  write_block = Div (write, c)
  from_block = Min (write_block, latest_start)
  written = Add (write, n)
  whole_blocks = Div (written, c)
  new_blocks = Sub (whole_blocks, write_block)
  most_new = ReduceMax <keepdims = 0> (new_blocks)
  completes = Greater (most_new, zero)
  new_summary = If (completes) <
    then_branch = summarised () => (block_summary)
    {
      from_row = Mul (from_block, c)
      from_row_1 = Unsqueeze (from_row, axis_1)
      span = Mul (touched, c)
      reads = Range (zero, span, one)
      block_row_any = Add (from_row_1, reads)
      block_row = Min (block_row_any, last_row)
      block_row_b1 = Unsqueeze (block_row, axes_13)
      block_rows = Expand (block_row_b1, by_key_head)
      block_key_any = GatherND <batch_dims = 2> (present_key, block_rows)
      block_key_own = Cast <to = 1> (block_key_any)
      as_blocks = Concat <axis = 0> (same, g, others, c_1, d)
      block_key = Reshape (block_key_own, as_blocks)
      block_mean = ReduceMean <keepdims = 0> (block_key, axis_3)
SUMMARISED
      block_summary = CastLike (summary_any, past_summary)
    },
    else_branch = as_before () => (old_summary)
    {
      from_block_1 = Unsqueeze (from_block, axis_1)
      old_reads = Range (zero, touched, one)
      old_row = Add (from_block_1, old_reads)
      old_row_b1 = Unsqueeze (old_row, axes_13)
      old_rows = Expand (old_row_b1, by_key_head)
      old_summary = GatherND <batch_dims = 2> (past_summary, old_rows)
    }
  >
  present_summary = TensorScatter <axis = 2> (past_summary, new_summary, from_block)
  summary_t = Transpose <perm = [0, 1, 3, 2]> (present_summary)
  number = Range (zero, many, one)
  own_block = Div (place, c)
  is_earlier = Less (number, own_block)
  block_first = Mul (number, c)
  block_last = Add (block_first, c_less)
  block_apart = Sub (place, block_last)
  is_reached = Less (block_apart, reach)
  candidate = And (is_earlier, is_reached)
  forced = Constant <value_int = 1> ()"""

# MoBA: products with mean keys, a head for itself
_MEANS = """
  summary_any = Identity (block_mean)"""
BLOCKS = """
  as_group = Concat <axis = 0> (same, g, others, same)
  q_to_rank = Mul (q, factor)
  q_short = Reshape (q_to_rank, as_group)
  rank_rows = MatMul (q_short, summary_t)
  as_heads = Concat <axis = 0> (same, others, n_1, many_1)
  rank_any = Reshape (rank_rows, as_heads)
  rank_scores = Cast <to = 1> (rank_any)
RANK"""

# SeerAttention's gate: the queries that read a KV head together, not capped
_POOLED = """
  block_most = ReduceMax <keepdims = 0> (block_key, axis_3)
  block_least = ReduceMin <keepdims = 0> (block_key, axis_3)
  pooled_float = Concat <axis = 3> (block_most, block_least, block_mean)
  pooled = CastLike (pooled_float, key)
  summary_any = MatMul (pooled, key_map)"""
GATE = """
  as_group = Concat <axis = 0> (same, g, others, n_1, d)
  q_group = Reshape (q, as_group)
  q_beside = Transpose <perm = [0, 1, 3, 2, 4]> (q_group)
  as_one = Concat <axis = 0> (same, g, n_1, others)
  q_one = Reshape (q_beside, as_one)
  q_mapped = MatMul (q_one, query_map)
  rank_any = MatMul (q_mapped, summary_t)
  rank_float = Cast <to = 1> (rank_any)
  map_width = Shape <start = 3, end = 4> (past_summary)
  map_width_float = Cast <to = 1> (map_width)
  map_root = Sqrt (map_width_float)
  rank_scores = Div (rank_float, map_root)
RANK"""

PICK_OF_BLOCKS = """
      order_chooser = Shape <start = 1, end = 2> (order)
      by_order = Concat <axis = 0> (one_1, order_chooser, one_1, one_1)
      own_blocks = Expand (own_block, by_order)
      all_blocks = Concat <axis = 3> (own_blocks, order)
      own_taken = Equal (own_blocks, own_blocks)
      all_taken = Concat <axis = 3> (own_taken, taken)
      axis_4 = Constant <value_ints = [4]> ()
      all_blocks_1 = Unsqueeze (all_blocks, axis_4)
      all_first = Mul (all_blocks_1, c)
      inside = Range (zero, c, one)
      pick_blocks = Add (all_first, inside)
      as_pick = Concat <axis = 0> (same, same, same, others)
      pick = Reshape (pick_blocks, as_pick)
      all_taken_1 = Unsqueeze (all_taken, axis_4)
      pick_shape = Shape (pick_blocks)
      pick_taken = Expand (all_taken_1, pick_shape)
      picked = Reshape (pick_taken, as_pick)"""

MASK_OF_BLOCKS = """
      none = Less (ranked, ranked)
      by_block = ScatterElements <axis = 3> (none, order, taken)
      is_own_block = Equal (number, own_block)
      with_own = Or (by_block, is_own_block)
      axis_3_last = Constant <value_ints = [3]> ()
      axis_4 = Constant <value_ints = [4]> ()
      total_more = Add (total, c_less)
      used_blocks = Div (total_more, c)
      used_1 = Unsqueeze (used_blocks, axis_0)
      in_use = Slice (with_own, same, used_1, axis_3_last)
      in_use_1 = Unsqueeze (in_use, axis_4)
      as_tokens = Concat <axis = 0> (one_1, one_1, one_1, one_1, c_1)
      by_token_5 = Expand (in_use_1, as_tokens)
      flat = Concat <axis = 0> (same, same, same, others)
      by_token = Reshape (by_token_5, flat)
      chosen = Slice (by_token, same, total_1, axis_3_last)"""


def ranking(body: str, name: str, budgets: tuple[str, ...], capped: bool) -> str:
    """The body with what stands for RANK, BUDGET and SUMMARISED.

    Args:
        body: of a node.
        name: of the node.
        budgets: those that some node of the file has, in any order.
        capped: some node may have a softcap.
    """
    body = body.replace("SUMMARISED", _POOLED if name == "GateAttention" else _MEANS)
    certain = name in _CERTAIN
    counts = [b for b in COUNTS if b in budgets]
    shares = [b for b in _SHARES if b in budgets]
    lines, total = "".join(COUNTS[b] for b in counts), "endless"
    for b in counts:
        lines += f"\n  least_{b} = Min ({total}, count_{b})"
        total = f"least_{b}"
    lines += f"\n  count{'_any' * certain} = Min ({total}, free)"
    if certain:
        lines += "\n  count = Max (count_any, certain_many)"
    more, last = _PARTS if shares else "", "in_budget"
    for b in shares:
        more += f"{_SHARES[b]}\n  and_{b} = And ({last}, in_{b})"
        last = f"and_{b}"
    rank = _RANK.replace(_TAKEN, _TAKEN_CERTAIN) if certain else _RANK
    rank = rank.replace("COUNT", lines).replace("SHARES", more).replace("LAST", last)
    rank = rank.replace("LIFT", _LIFT if certain or name == "PooledBlocksAttention" else _NO_LIFT)
    bent = _capped() if capped and name not in _STRAIGHT else _PLAIN
    body = body.replace("\nBUDGET", lines)
    return body.replace("\nRANK", rank).replace("CAP_RANKS", bent)


_NO_LIFT = """
  lifted = Identity (ranks)"""
# What is certain comes first where numbers are counted, and has its share where shares are.
_LIFT = """
  top_int = Constant <value_int: int = @topk> ()
  top_ratio = Constant <value_float: float = @ratio> ()
  is_top = Greater (top_int, zero)
  no_top_ratio = Constant <value_float = 0.0> ()
  is_top_ratio = Greater (top_ratio, no_top_ratio)
  is_counted = Or (is_top, is_top_ratio)
  is_first = And (certain, is_counted)
  highest = Constant <value_float = 1.0e38> ()
  lifted = Where (is_first, highest, ranks)"""
_PLAIN = """
  ranks = Identity (rank_scores)"""


def _capped() -> str:
    """The lines of a softcap, for ranks."""
    text = re.sub(r"\bcapped\b", "ranks", CAPPED)
    return re.sub(r"\b(then_|else_)?scores\b", r"\1rank_scores", text)
