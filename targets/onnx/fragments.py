"""Lines that the bodies of several nodes share, in ONNX's textual syntax.

What an attribute decides is an If with a constant condition: a runtime folds it when it loads the
file.
"""

from __future__ import annotations

#: the softcap, and whether there is one
CAP = """
  cap = Constant <value_float: float = @softcap> ()
  zero_float = Constant <value_float = 0.0> ()
  is_capped = Greater (cap, zero_float)"""

#: scores -> capped
CAPPED = """
  capped = If (is_capped) <
    then_branch = with_cap () => (then_scores)
    {
      shrunk = Div (scores, cap)
      bent = Tanh (shrunk)
      then_scores = Mul (bent, cap)
    },
    else_branch = without_cap () => (else_scores)
    {
      else_scores = Identity (scores)
    }
  >"""
NOT_CAPPED = """
  capped = Identity (scores)"""

# Constants, the factor of queries, and sizes.
_SIZES = """
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q)
  shown_score = Constant <value_float = 0.0> ()
  hidden_score = Constant <value_float = -1.0e38> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  same = Constant <value_ints = [0]> ()
  others = Constant <value_ints = [-1]> ()
  n_1 = Shape <start = 2, end = 3> (q)
  n = Squeeze (n_1, axis_0)
  g = Shape <start = 1, end = 2> (key)"""

# Where the tokens of a call stand, and how far the block itself looks back.
_SPAN = """
  endless = Constant <value_int = 4611686018427387904> ()
  own = Constant <value_int: int = @sliding_window> ()
  is_own = Greater (own, zero)
  reach = Where (is_own, own, endless)
  start = Cast <to = 7> (kv_start)
  lengths = Cast <to = 7> (kv_len)"""

# scores_any, visible -> weights in the scores' dtype. The softmax is in float32. The mask is added:
# a Where over all heads takes ONNX Runtime twice as long.
_SOFTMAX = """
  scores = Cast <to = 1> (scores_any)
CAPPED
  bias = Where (visible, shown_score, hidden_score)
  masked = Add (capped, bias)
  weights_float = Softmax <axis = -1> (masked)
  weights = CastLike (weights_float, scores_any)"""


# one token's queries in rows, by KV head, over all rows of a state
_ONE_TOKEN = """
      by_group = Concat <axis = 0> (same, g, others, same)
      q_rows = Reshape (q, by_group)
      q_scaled = Mul (q_rows, factor)
      key_t = Transpose <perm = [0, 1, 3, 2]> (KEY)
      scores_any = MatMul (q_scaled, key_t)
SOFTMAX
      y_rows = MatMul (weights, VALUE)
      by_head = Concat <axis = 0> (same, others, n_1, same)
      step_y = Reshape (y_rows, by_head)"""


def one_token(key: str, value: str) -> str:
    """Lines that make `step_y` of one token, q, from `visible` and all rows of these values."""
    return _ONE_TOKEN.replace("KEY", key).replace("VALUE", value)


# The rows [B, H, R, K] that regions of queries read, of each query head's own KV head: read_key and
# read_value [B, H, R, K, d or e], and key_t.
_READ_ROWS = """
      row_1 = Constant <value_ints = [1]> ()
      as_index = Concat <axis = 0> (same, g, others, row_1)
      row_index = Reshape (rows_in, as_index)
      key_flat = GatherND <batch_dims = 2> (HELD_KEY, row_index)
      value_flat = GatherND <batch_dims = 2> (HELD_VALUE, row_index)
      rows_shape = Shape (rows_in)
      key_width = Shape <start = 3, end = 4> (key)
      value_width = Shape <start = 3, end = 4> (value)
      as_keys = Concat <axis = 0> (rows_shape, key_width)
      as_values = Concat <axis = 0> (rows_shape, value_width)
      read_key = Reshape (key_flat, as_keys)
      read_value = Reshape (value_flat, as_values)
      key_t = Transpose <perm = [0, 1, 2, 4, 3]> (read_key)"""


def read_rows(key: str, value: str) -> str:
    """Lines that gather, of these values, the rows `rows_in` that each region of queries reads."""
    return _READ_ROWS.replace("HELD_KEY", key).replace("HELD_VALUE", value)


def finished(body: str, capped: bool) -> str:
    """The body of a node with what stands for COMMON (or, without states, SIZES) and SOFTMAX.

    Args:
        body: with these words on lines of their own.
        capped: some node may have a softcap.
    """
    body = body.replace("COMMON", f"SIZES{_SPAN}")
    body = body.replace("\nSIZES", _SIZES + (CAP if capped else ""))
    return body.replace("SOFTMAX", _SOFTMAX).replace("CAPPED", CAPPED if capped else NOT_CAPPED)
