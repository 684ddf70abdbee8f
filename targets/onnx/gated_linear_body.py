"""The body of `GatedLinearAttention`: a state in which every feature decays by itself.

It is `reattend::linear_attention` with a decay [B, S, N, f]. Several tokens are cut into chunks of
`CHUNK`; a scan carries the state from chunk to chunk. Pairs inside of a chunk are split by halves,
so that no exponent is positive (`kernels/ops/linear_attention/channels.py` says why).
"""

from __future__ import annotations

from reattend.targets.onnx.linear_body import CHUNKED, SIZES, WHOLE_CHUNKS

GATED = "GatedLinearAttention"
#: Tokens of a chunk: a power of two.
CHUNK = 64

_BODY = """GatedLinearAttention
<q_num_heads: int, kv_num_heads: int>
(q, key, value, decay, past_state) => (y, present_state)
{
SIZES
  heads = Shape <start = 1, end = 2> (key)
  grouped = Concat <axis = 0> (same, heads, others)
  f = Shape <start = 3, end = 4> (key)
  columns = Shape <start = 3, end = 4> (value)
  by_head = Concat <axis = 0> (same, others, n_1, columns)
  is_step = Equal (n, one)
  y, present_state = If (is_step) <
    then_branch = step () => (step_y, step_state)
    {
      left = Exp (decay)
      left_t = Transpose <perm = [0, 1, 3, 2]> (left)
      kept = Mul (past_state, left_t)
      key_t = Transpose <perm = [0, 1, 3, 2]> (key)
      new = Mul (key_t, value)
      step_state = Add (kept, new)
      rows_of_f = Concat <axis = 0> (grouped, f)
      q_rows = Reshape (q, rows_of_f)
      y_rows = MatMul (q_rows, step_state)
      step_y = Reshape (y_rows, by_head)
    },
    else_branch = chunks () => (chunks_y, chunks_state)
    {
      c = Constant <value_int = @CHUNK> ()
CUT
      decay_padded = Pad (decay, pads, nothing, axis_2)
      decay_cut = Reshape (decay_padded, cut_heads)
      three = Constant <value_int = 3> ()
      sums = CumSum (decay_cut, three)
      whole = ReduceSum <keepdims = 1> (decay_cut, axis_3)
      ago_log = Sub (whole, sums)
      ago = Exp (ago_log)
      key_left = Mul (key_cut, ago)
      given_t = Transpose <perm = [0, 1, 2, 4, 3]> (key_left)
      given = MatMul (given_t, value_cut)
      given_first = Transpose <perm = [2, 0, 1, 3, 4]> (given)
      whole_left = Exp (whole)
      whole_first = Transpose <perm = [2, 0, 1, 4, 3]> (whole_left)
      chunks_state, before_first = Scan <
        body = carry (float[b, h, f, e] s_in, float[b, h, f, e] s_new, float[b, h, f, o] s_left)
          => (float[b, h, f, e] s_out, float[b, h, f, e] s_before)
        {
          s_kept = Mul (s_in, s_left)
          s_out = Add (s_kept, s_new)
          s_before = Identity (s_in)
        },
        num_scan_inputs = 2
      > (past_state, given_first, whole_first)
      before = Transpose <perm = [1, 2, 0, 3, 4]> (before_first)
      now = Exp (sums)
      now_shared = Unsqueeze (now, axis_2)
      q_now = Mul (q_cut, now_shared)
      before_shared = Unsqueeze (before, axis_2)
      far = MatMul (q_now, before_shared)
      key_shared = Unsqueeze (key_cut, axis_2)
      value_shared = Unsqueeze (value_cut, axis_2)
      own_products = Mul (q_cut, key_shared)
      axis_5 = Constant <value_ints = [5]> ()
      own_scores = ReduceSum <keepdims = 1> (own_products, axis_5)
      own = Mul (own_scores, value_shared)
      sum_0 = Add (far, own)
      whole_shape = Shape (sum_0)
      border_pads = Constant <value_ints = [1, 0]> ()
      axis_4 = Constant <value_ints = [4]> ()
HALVES
      padded_by_head = Concat <axis = 0> (same, others, padded_1, columns)
      y_padded = Reshape (sum_@LAST, padded_by_head)
      chunks_y = Slice (y_padded, same, n_1, axis_2)
    }
  >
}"""

# block: (earlier half, later half) of @SIZE tokens; a query of the later and a key of the earlier
# are both measured from the last token of the earlier
_HALF = """
      block_@I = Constant <value_ints = [2, @SIZE]> ()
      rows_@I = Concat <axis = 0> (same, same, others, block_@I)
      key_rows_@I = Concat <axis = 0> (rows_@I, f)
      value_rows_@I = Concat <axis = 0> (rows_@I, columns)
      query_rows_@I = Concat <axis = 0> (same, same, same, others, block_@I, f)
      sums_@I = Reshape (sums, key_rows_@I)
      keys_@I = Reshape (key_cut, key_rows_@I)
      values_@I = Reshape (value_cut, value_rows_@I)
      queries_@I = Reshape (q_cut, query_rows_@I)
      sums_early_@I = Gather <axis = 3> (sums_@I, zero)
      sums_late_@I = Gather <axis = 3> (sums_@I, one)
      key_@I = Gather <axis = 3> (keys_@I, zero)
      value_@I = Gather <axis = 3> (values_@I, zero)
      query_@I = Gather <axis = 4> (queries_@I, one)
      border_@I = Slice (sums_early_@I, others, last_index, axis_3)
      since_log_@I = Sub (sums_late_@I, border_@I)
      since_@I = Exp (since_log_@I)
      until_log_@I = Sub (border_@I, sums_early_@I)
      until_@I = Exp (until_log_@I)
      since_shared_@I = Unsqueeze (since_@I, axis_2)
      late_@I = Mul (query_@I, since_shared_@I)
      early_@I = Mul (key_@I, until_@I)
      early_t_@I = Transpose <perm = [0, 1, 2, 4, 3]> (early_@I)
      early_shared_@I = Unsqueeze (early_t_@I, axis_2)
      scores_@I = MatMul (late_@I, early_shared_@I)
      early_values_@I = Unsqueeze (value_@I, axis_2)
      near_@I = MatMul (scores_@I, early_values_@I)
      near_1_@I = Unsqueeze (near_@I, axis_4)
      near_2_@I = Pad (near_1_@I, border_pads, nothing, axis_4)
      near_all_@I = Reshape (near_2_@I, whole_shape)
      sum_@NEXT = Add (sum_@I, near_all_@I)"""


def gated_linear_body() -> str:
    """`GatedLinearAttention` without the domain's line."""
    parts, size, number = [], CHUNK // 2, 0
    while size:
        part = _HALF.replace("@SIZE", str(size)).replace("@NEXT", str(number + 1))
        parts.append(part.replace("@I", str(number)))
        size, number = size // 2, number + 1
    last = "      last_index = Constant <value_ints = [9223372036854775807]> ()"
    body = _BODY.replace("HALVES", last + "".join(parts)).replace("@LAST", str(number))
    return (
        body.replace("@CHUNK", str(CHUNK))
        .replace("\nCUT", WHOLE_CHUNKS + CHUNKED)
        .replace("\nSIZES", SIZES)
    )
