"""The node of heads that read, in later passes over a text, what one pass saw (SparseD).

`phase` says what a call does: 0 reads every key; 1 does, and finds for every block of queries the
blocks that it pays most attention to; 2 reads those that it is given; 3 finds them and reads them
at once. Letters: B batch, H query heads, N tokens, c tokens per block, P blocks, K blocks that are
read, d and e widths. The meaning is that of `reattend.mixers.selecting.observed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import attend
from reattend.mixers.selecting.base import Asked
from reattend.mixers.selecting.observed import ObservedMethod
from reattend.patterns.routing import Observed
from reattend.targets.onnx.fragments import OWN_ROWS, ROWS_TOGETHER, finished

OBSERVED = "ObservedAttention"
INPUTS = ("q", "key", "value", "past_blocks", "phase", "prompt_blocks")

_BODY = """ObservedAttention <scale: float, softcap: float, block: int, topk: int, ratio: float>
(q, key, value, past_blocks, phase, prompt_blocks) => (y, blocks)
{
SIZES
  two = Constant <value_int = 2> ()
  axis_3 = Constant <value_ints = [3]> ()
  axis_4 = Constant <value_ints = [4]> ()
  h_1 = Shape <start = 1, end = 2> (q)
  e_1 = Shape <start = 3, end = 4> (value)
  c = Constant <value_int: int = @block> ()
  c_1 = Unsqueeze (c, axis_0)
  c_less = Sub (c, one)
  n_more = Add (n, c_less)
  p = Div (n_more, c)
  p_1 = Unsqueeze (p, axis_0)
  span = Mul (p, c)
  span_1 = Unsqueeze (span, axis_0)
  n_less = Sub (n, one)
  inside = Range (zero, c, one)
  number = Range (zero, p, one)
  by_group = Concat <axis = 0> (same, g, others, same)
  by_head = Concat <axis = 0> (same, others, n_1, same)
  phase_now = Squeeze (phase, axis_0)
  is_odd = Mod (phase_now, two)
  observes = Equal (is_odd, one)
  reads = GreaterOrEqual (phase_now, two)
  blocks = If (observes) <
    then_branch = observed () => (found_blocks)
    {
ALL
      missing = Sub (span_1, n_1)
      no_pad = Constant <value_ints = [0, 0, 0, 0, 0, 0]> ()
      pads = Concat <axis = 0> (no_pad, missing, missing)
      padded = Pad (weights_float, pads, shown_score)
      by_pair = Concat <axis = 0> (same, same, p_1, c_1, p_1, c_1)
      pairs = Reshape (padded, by_pair)
      axes_35 = Constant <value_ints = [3, 5]> ()
      paid = ReduceSum <keepdims = 0> (pairs, axes_35)
      is_prompt = Less (number, prompt_blocks)
      not_there = Constant <value_float = -1.0> ()
      paid_prompt = Where (is_prompt, paid, not_there)
      paid_new = Where (is_prompt, not_there, paid)
      new_many = Sub (p_1, prompt_blocks)
      topk_int = Constant <value_int: int = @topk> ()
      topk_1 = Unsqueeze (topk_int, axis_0)
      ratio_float = Constant <value_float: float = @ratio> ()
      is_number = Greater (topk_1, same)
COUNTS
      prompt_best, prompt_order = TopK <axis = 3> (paid_prompt, prompt_count)
      new_best, new_order = TopK <axis = 3> (paid_new, new_count)
      found_blocks = Concat <axis = 3> (prompt_order, new_order)
    },
    else_branch = as_given () => (same_blocks)
    {
      same_blocks = Identity (past_blocks)
    }
  >
  y = If (reads) <
    then_branch = read_blocks () => (block_y)
    {
READ
    },
    else_branch = see_all () => (all_y)
    {
ALL
      weight_rows = Reshape (weights, by_group)
      y_rows = MatMul (weight_rows, value)
      all_y = Reshape (y_rows, by_head)
    }
  >
}"""

_ALL = """
      q_rows = Reshape (q, by_group)
      q_scaled = Mul (q_rows, factor)
      key_t = Transpose <perm = [0, 1, 3, 2]> (key)
      score_rows = MatMul (q_scaled, key_t)
      scores_any = Reshape (score_rows, by_head)
      visible = Equal (one, one)
MANY_WEIGHTS"""

_COUNT = """
          many_MINE = Cast <to = 1> (MANY)
          exact_MINE = Mul (many_MINE, ratio_float)
          exact_up_MINE = Ceil (exact_MINE)
          by_ratio_MINE = Cast <to = 7> (exact_up_MINE)
          by_number_MINE = Min (topk_1, MANY)
          MINE_count = Where (is_number, by_number_MINE, by_ratio_MINE)"""
_COUNTS = _COUNT.replace("MINE", "prompt").replace("MANY", "prompt_blocks") + _COUNT.replace(
    "MINE", "new"
).replace("MANY", "new_many")

# blocks [B, H, P, K] -> block_y: every block of queries with the rows of its blocks, and of its
# own block the query's own row, where that is not among them. One block of one head after another.
_READ = f"""{ROWS_TOGETHER}
      own_begin = Mul (number, c)
      own_begin_p1 = Unsqueeze (own_begin, others)
      own_row_pc = Add (own_begin_p1, inside)
      first_1 = Unsqueeze (blocks, axis_4)
      first_row = Mul (first_1, c)
      row_5 = Add (first_row, inside)
      flat_4 = Concat <axis = 0> (same, same, same, others)
      row = Reshape (row_5, flat_4)
      number_p1 = Unsqueeze (number, others)
      is_own = Equal (blocks, number_p1)
      is_own_int = Cast <to = 7> (is_own)
      own_many = ReduceMax <keepdims = 1> (is_own_int, axis_3)
      has_own = Greater (own_many, zero)
      rows_first = Transpose <perm = [2, 0, 1, 3]> (row)
      has_own_first = Transpose <perm = [2, 0, 1, 3]> (has_own)
      by_query = Concat <axis = 0> (axis_1, axis_1, c_1, axis_1)
      y_first = Scan <
        body = of_a_block (
          int64[c] place, int64[b, h, k] chosen_row, bool[b, h, o] has
        ) => (y_region)
        {{
          has_shape = Shape (has)
          own_row = Expand (place, has_shape)
          rows_any = Concat <axis = 2> (chosen_row, own_row)
          rows_in = Min (rows_any, n_less)
          is_row = Less (chosen_row, n)
          is_row_1 = Unsqueeze (is_row, axis_2)
          is_chosen = Expand (is_row_1, by_query)
          place_c1 = Unsqueeze (place, axis_1)
          is_self = Equal (place_c1, place)
          has_not = Not (has)
          has_not_1 = Unsqueeze (has_not, axis_2)
          is_alone = And (has_not_1, is_self)
          own_seen = Concat <axis = 3> (is_chosen, is_alone)
          own_queries = Min (place, n_less)
          own_q = Gather <axis = 2> (q, own_queries){OWN_ROWS}
        }},
        num_scan_inputs = 3
      > (own_row_pc, rows_first, has_own_first)
      y_blocks = Transpose <perm = [1, 2, 0, 3, 4]> (y_first)
      as_span = Concat <axis = 0> (same, h_1, span_1, e_1)
      y_span = Reshape (y_blocks, as_span)
      block_y = Slice (y_span, same, n_1, axis_2)"""


def observed_body(capped: bool = True) -> str:
    """The body without the domain's line.

    Args:
        capped: some node may have a softcap.
    """
    body = _BODY.replace("COUNTS", _COUNTS)
    return finished(body.replace("READ", _READ).replace("ALL", _ALL), capped)


@torch.library.custom_op("reattend::observed_attention", mutates_args=())
def observed_attention(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, past_blocks: Tensor, phase: Tensor,
    prompt_blocks: Tensor, block: int, topk: int, ratio: float, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One pass over texts without padding.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of all tokens.
        past_blocks: which blocks every block of queries reads, [B, H, P, K]; read in phase 2.
        phase: [1], see above.
        prompt_blocks: [1], the first blocks, which are chosen apart from the others.
        block: c.
        topk, ratio: of each part, so many blocks or this share; 0: the other.
        scale, softcap: of the scores.

    Returns:
        y [B, H, N, e], and the blocks found, or those given.
    """
    core = CoreConfig(
        heads=q_BHNd.shape[1], kv_heads=k_BGNd.shape[1], qk_head_dim=q_BHNd.shape[3],
        v_head_dim=v_BGNe.shape[3], scale=scale, softcap=softcap, pattern="full",
    )  # fmt: skip
    budget = {"topk": topk} if topk else {"ratio": ratio}
    method = ObservedMethod(Observed(kind="observed", block=block, **budget))
    n, now = q_BHNd.shape[2], int(phase)
    many, blocks = -(-n // block), past_blocks.clone()
    if now in (1, 3):
        asked = Asked(q_BHNd, k_BGNd, core, None, None, v_BGNe)
        map_BHPQ = method.observed(asked, int(prompt_blocks))
        blocks = map_BHPQ.byte().topk(int(map_BHPQ[0, 0, 0].sum())).indices
    if now < 2:
        return attend(q_BHNd, k_BGNd, v_BGNe, core, None), blocks
    shape = (*q_BHNd.shape[:2], many, many)
    seen = torch.zeros(shape, dtype=torch.bool).scatter(3, blocks, True)
    seen = seen.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :n, :n]
    return attend(q_BHNd, k_BGNd, v_BGNe, core, seen | torch.eye(n, dtype=torch.bool)), blocks


@observed_attention.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, past_blocks: Tensor, phase: Tensor, prompt_blocks: Tensor,
    block: int, topk: int, ratio: float, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3]), past_blocks.new_empty(past_blocks.shape)
