"""The bodies of the nodes of linear attention in ONNX's textual syntax, standard operators only.

`LinearAttention` is `reattend::linear_attention` with lag 0 and nothing divided. One token reads
and writes the state once. Several are cut into T chunks of C: pairs inside of a chunk are products
under a mask, all that is older comes from the state before it, so work grows with N and not with
its square. Where nodes have decays, the state before a chunk is a product of what all chunks before
gave with what is left of it; else a running sum.

`GatedLinearAttention` (`gated_linear_body.py`) is the same where every feature decays by itself.
`WindowLinearAttention` (`window_linear_body.py`) attends to a window of keys by softmax, and holds
rows of those beside the state.
"""

from __future__ import annotations

LINEAR = ("LinearAttention", "GatedLinearAttention", "WindowLinearAttention")

#: the numbers that reshapes are made of
SIZES = """
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  same = Constant <value_ints = [0]> ()
  one_1 = Constant <value_ints = [1]> ()
  two_1 = Constant <value_ints = [2]> ()
  others = Constant <value_ints = [-1]> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  axis_3 = Constant <value_ints = [3]> ()
  nothing = Constant <value_float = 0.0> ()
  n_1 = Shape <start = 2, end = 3> (q)
  n = Squeeze (n_1, axis_0)
"""

#: chunks of c tokens: how many, and what fills up the last
WHOLE_CHUNKS = """
      c_1 = Unsqueeze (c, axis_0)
      c_less = Sub (c, one)
      n_up = Add (n, c_less)
      count = Div (n_up, c)
      count_1 = Unsqueeze (count, axis_0)
      padded_n = Mul (count, c)
      padded_1 = Unsqueeze (padded_n, axis_0)
      missing = Sub (padded_n, n)
      missing_1 = Unsqueeze (missing, axis_0)
      pads = Concat <axis = 0> (same, missing_1)"""

#: the same, c no more than there are
CUT = f"""
      most_c = Constant <value_int: int = @chunk> ()
      c = Min (n, most_c){WHOLE_CHUNKS}"""

#: queries, keys and values in those chunks
CHUNKED = """
      q_padded = Pad (q, pads, nothing, axis_2)
      key_padded = Pad (key, pads, nothing, axis_2)
      value_padded = Pad (value, pads, nothing, axis_2)
      cut_heads = Concat <axis = 0> (same, heads, count_1, c_1, others)
      cut_queries = Concat <axis = 0> (grouped, count_1, c_1, f)
      q_cut = Reshape (q_padded, cut_queries)
      key_cut = Reshape (key_padded, cut_heads)
      value_cut = Reshape (value_padded, cut_heads)"""

# The numbers of heads are not read: onnx has an operator of this name that they are required by.
_LINEAR = """LinearAttention
<chunk: int, q_num_heads: int, kv_num_heads: int, decays: int = 0>
(q, key, value, decay, past_state) => (y, present_state)
{
SIZES
  heads = Shape <start = 1, end = 2> (key)
  grouped = Concat <axis = 0> (same, heads, others)
  f = Shape <start = 3, end = 4> (key)
  columns = Shape <start = 3, end = 4> (value)
  is_step = Equal (n, one)
  y, present_state = If (is_step) <
    then_branch = step () => (step_y, step_state)
    {
STEP_DECAY
      key_t = Transpose <perm = [0, 1, 3, 2]> (key)
      new = Mul (key_t, value)
      step_state = Add (kept, new)
      rows_of_f = Concat <axis = 0> (grouped, f)
      q_rows = Reshape (q, rows_of_f)
      y_rows = MatMul (q_rows, step_state)
      by_head = Concat <axis = 0> (same, others, one_1, columns)
      step_y = Reshape (y_rows, by_head)
    },
    else_branch = chunks () => (chunks_y, chunks_state)
    {
CUT
      place = Range (zero, c, one)
      place_1 = Unsqueeze (place, axis_1)
      seen = LessOrEqual (place, place_1)
DECAYED
      key_shared = Unsqueeze (key_cut, axis_2)
      value_shared = Unsqueeze (value_cut, axis_2)
      key_t = Transpose <perm = [0, 1, 2, 3, 5, 4]> (key_shared)
      scores = MatMul (q_cut, key_t)
      weights = Mul (scores, left)
      near = MatMul (weights, value_shared)
      before_shared = Unsqueeze (before, axis_2)
      far = MatMul (q_now, before_shared)
      y_cut = Add (near, far)
      by_head = Concat <axis = 0> (same, others, padded_1, columns)
      y_padded = Reshape (y_cut, by_head)
      chunks_y = Slice (y_padded, same, n_1, axis_2)
    }
  >
}"""

_STEP_DECAY = """
      left = Exp (decay)
      left_1 = Unsqueeze (left, axis_3)
      kept = Mul (past_state, left_1)"""
_STEP_PLAIN = """
      kept = Identity (past_state)"""

# -> left: of each key of a chunk to each query; before: the state before each chunk; q_now: queries
# as they read it; chunks_state
_PLAIN = """
      left = CastLike (seen, key)
      given_t = Transpose <perm = [0, 1, 2, 4, 3]> (key_cut)
      given = MatMul (given_t, value_cut)
      two = Constant <value_int = 2> ()
      older = CumSum <exclusive = 1> (given, two)
      past_1 = Unsqueeze (past_state, axis_2)
      before = Add (older, past_1)
      total = ReduceSum <keepdims = 0> (given, axis_2)
      chunks_state = Add (past_state, total)
      q_now = Identity (q_cut)"""

_DECAYED = """
      decay_padded = Pad (decay, pads, nothing, axis_2)
      cut_decay = Concat <axis = 0> (same, heads, count_1, c_1)
      decay_cut = Reshape (decay_padded, cut_decay)
      three = Constant <value_int = 3> ()
      within = CumSum (decay_cut, three)
      whole = ReduceSum <keepdims = 1> (decay_cut, axis_3)
      ago = Sub (whole, within)
      ago_left = Exp (ago)
      axis_4 = Constant <value_ints = [4]> ()
      ago_1 = Unsqueeze (ago_left, axis_4)
      key_left = Mul (key_cut, ago_1)
      given_t = Transpose <perm = [0, 1, 2, 4, 3]> (key_left)
      given = MatMul (given_t, value_cut)
      hidden = Constant <value_float = -1.0e38> ()
      query_sum = Unsqueeze (within, axis_4)
      key_sum = Unsqueeze (within, axis_3)
      apart = Sub (query_sum, key_sum)
      shown = Where (seen, apart, hidden)
      left_any = Exp (shown)
      left = Unsqueeze (left_any, axis_2)
      whole_t = Squeeze (whole, axis_3)
      two = Constant <value_int = 2> ()
      ends = CumSum (whole_t, two)
      starts = Sub (ends, whole_t)
      start_1 = Unsqueeze (starts, axis_3)
      end_1 = Unsqueeze (ends, axis_2)
      since = Sub (start_1, end_1)
      chunk = Range (zero, count, one)
      chunk_1 = Unsqueeze (chunk, axis_1)
      is_older = Less (chunk, chunk_1)
      since_shown = Where (is_older, since, hidden)
      since_left = Exp (since_shown)
      flat = Concat <axis = 0> (same, heads, count_1, others)
      given_flat = Reshape (given, flat)
      older_flat = MatMul (since_left, given_flat)
      state_shape = Concat <axis = 0> (same, heads, count_1, f, others)
      older = Reshape (older_flat, state_shape)
      past_1 = Unsqueeze (past_state, axis_2)
      starts_left = Exp (start_1)
      starts_2 = Unsqueeze (starts_left, axis_4)
      past_left = Mul (past_1, starts_2)
      before = Add (older, past_left)
      last_1 = Sub (count_1, one_1)
      state_last = Slice (before, last_1, count_1, axis_2)
      whole_last = Slice (whole, last_1, count_1, axis_2)
      whole_left = Exp (whole_last)
      given_last = Slice (given, last_1, count_1, axis_2)
      whole_2 = Unsqueeze (whole_left, axis_4)
      state_left = Mul (state_last, whole_2)
      state_all = Add (state_left, given_last)
      chunks_state = Squeeze (state_all, axis_2)
      within_left = Exp (within)
      within_1 = Unsqueeze (within_left, axis_2)
      axis_5 = Constant <value_ints = [5]> ()
      within_2 = Unsqueeze (within_1, axis_5)
      q_now = Mul (q_cut, within_2)"""


def linear_body(decayed: bool) -> str:
    """`LinearAttention` without the domain's line.

    Args:
        decayed: some node has decays; else that input is not read.
    """
    body = _LINEAR.replace("\nSTEP_DECAY", _STEP_DECAY if decayed else _STEP_PLAIN)
    body = body.replace("\nDECAYED", _DECAYED if decayed else _PLAIN)
    return body.replace("\nCUT", CUT + CHUNKED).replace("\nSIZES", SIZES)
