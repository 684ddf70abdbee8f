"""The meaning of our nodes in standard ops: one function body each, attached to every model.

The text below is ONNX's own textual syntax. Both bodies take the *row-wise* form: the query heads
that share keys become rows of one matrix product, so a decode step reads the cache once and not
once per head (on a CPU 2 to 3 times faster than the Attention op for latent rows). Only standard
operators are used, so any runtime runs the file; a kernel registered for the node's name takes
over where one is loaded.

Where some layer has no rotary part (R = 0) the latent body branches on it, because a product over
zero columns is not zero in ONNX Runtime 1.31 (its fused transposed MatMul leaves the output unset).
Elsewhere the branch is left out: it cannot fold, and costs a subgraph call per layer.

Semantics are those of `reattend::attention`: query i is at index kv_len - N + i and sees key j iff
kv_start <= j < kv_len, j <= index (causal) and index - j < sliding_window (if > 0). A query that
sees nothing gives 0. Rows outside [kv_start, kv_len) must hold finite numbers: their weight is 0.
"""

from __future__ import annotations

from typing import Any

DOMAIN = "ai.reattend"
VERSION = 1
OPSET = 24

_HEADER = """<domain: "{domain}", opset_import: ["" : {opset}]>
{name} <scale: float, causal: int = 1, sliding_window: int = 0, softcap: float = 0.0>
({inputs}) => (y)
"""

_LATENT = """{
  b = Shape <start = 0, end = 1> (q_nope)
  h = Shape <start = 1, end = 2> (q_nope)
  n = Shape <start = 2, end = 3> (q_nope)
  m = Shape <start = 1, end = 2> (latent)
  hn = Mul (h, n)
  r = Shape <start = 2, end = 3> (latent)
  rotary = Shape <start = 2, end = 3> (rope)
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q_nope)
  q_nope_scaled = Mul (q_nope, factor)
  q_rope_scaled = Mul (q_rope, factor)
  nope_shape = Concat <axis = 0> (b, hn, r)
  rope_shape = Concat <axis = 0> (b, hn, rotary)
  nope_rows = Reshape <allowzero = 1> (q_nope_scaled, nope_shape)
  rope_rows = Reshape <allowzero = 1> (q_rope_scaled, rope_shape)
  latent_t = Transpose <perm = [0, 2, 1]> (latent)
  nope_scores = MatMul (nope_rows, latent_t)
ROPE
SOFTMAX
  weight_shape = Concat <axis = 0> (b, hn, m)
  weight_rows = Reshape <allowzero = 1> (weights, weight_shape)
  y_rows = MatMul (weight_rows, latent)
  y_shape = Concat <axis = 0> (b, h, n, r)
  y_any = Reshape <allowzero = 1> (y_rows, y_shape)
  y = Mul (y_any, alive_like)
}"""

_DENSE = """{
  b = Shape <start = 0, end = 1> (q)
  h = Shape <start = 1, end = 2> (q)
  n = Shape <start = 2, end = 3> (q)
  d = Shape <start = 3, end = 4> (key)
  g = Shape <start = 1, end = 2> (key)
  m = Shape <start = 2, end = 3> (key)
  e = Shape <start = 3, end = 4> (value)
  all_rows = Mul (h, n)
  hn = Div (all_rows, g)
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q)
  q_scaled = Mul (q, factor)
  q_shape = Concat <axis = 0> (b, g, hn, d)
  q_rows = Reshape <allowzero = 1> (q_scaled, q_shape)
  key_t = Transpose <perm = [0, 1, 3, 2]> (key)
  score_rows = MatMul (q_rows, key_t)
SOFTMAX
  weight_shape = Concat <axis = 0> (b, g, hn, m)
  weight_rows = Reshape <allowzero = 1> (weights, weight_shape)
  y_rows = MatMul (weight_rows, value)
  y_shape = Concat <axis = 0> (b, h, n, e)
  y_any = Reshape <allowzero = 1> (y_rows, y_shape)
  y = Mul (y_any, alive_like)
}"""

_ROPE = """
  rope_t = Transpose <perm = [0, 2, 1]> (rope)
  rope_scores = MatMul (rope_rows, rope_t)
  score_rows = Add (nope_scores, rope_scores)"""

_ROPE_OR_NONE = """
  no_columns = Constant <value_int = 0> ()
  is_rotary = Greater (rotary, no_columns)
  score_rows = If (is_rotary) <
    then_branch = with_rope () => (then_rows)
    {
      rope_t = Transpose <perm = [0, 2, 1]> (rope)
      rope_scores = MatMul (rope_rows, rope_t)
      then_rows = Add (nope_scores, rope_scores)
    },
    else_branch = without_rope () => (else_rows)
    {
      else_rows = Identity (nope_scores)
    }
  >"""

# score_rows -> weights [b, h, n, m] and alive_like [b, 1, n, 1], both in the dtype of score_rows
_SOFTMAX = """
  score_shape = Concat <axis = 0> (b, h, n, m)
  scores_own = Reshape <allowzero = 1> (score_rows, score_shape)
  scores = Cast <to = 1> (scores_own)
  cap = Constant <value_float: float = @softcap> ()
  zero_float = Constant <value_float = 0.0> ()
  is_capped = Greater (cap, zero_float)
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
  >
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_13 = Constant <value_ints = [1, 3]> ()
  axis_0 = Constant <value_ints = [0]> ()
  start_any = Cast <to = 7> (kv_start)
  length_any = Cast <to = 7> (kv_len)
  start_b1 = Unsqueeze (start_any, axis_1)
  length_b1 = Unsqueeze (length_any, axis_1)
  n_scalar = Squeeze (n, axis_0)
  m_scalar = Squeeze (m, axis_0)
  query = Range (zero, n_scalar, one)
  before = Sub (length_b1, n)
  index_bn = Add (before, query)
  end_b1 = Sub (length_b1, one)
  causal_int = Constant <value_int: int = @causal> ()
  is_causal = Greater (causal_int, zero)
  last_bn = Where (is_causal, index_bn, end_b1)
  window = Constant <value_int: int = @sliding_window> ()
  has_window = Greater (window, zero)
  window_less = Sub (window, one)
  window_start = Sub (index_bn, window_less)
  earliest = Where (has_window, window_start, zero)
  first_bn = Max (earliest, start_b1)
  first = Unsqueeze (first_bn, axis_13)
  last = Unsqueeze (last_bn, axis_13)
  row = Range (zero, m_scalar, one)
  after_first = GreaterOrEqual (row, first)
  before_last = LessOrEqual (row, last)
  visible = And (after_first, before_last)
  hidden_score = Constant <value_float = -1.0e38> ()
  masked = Where (visible, capped, hidden_score)
  weights_float = Softmax <axis = -1> (masked)
  weights = CastLike (weights_float, score_rows)
  alive = LessOrEqual (first, last)
  alive_like = CastLike (alive, score_rows)
"""

_INPUTS = {
    "LatentAttention": ("q_nope", "q_rope", "latent", "rope", "kv_start", "kv_len"),
    "Attention": ("q", "key", "value", "kv_start", "kv_len"),
}
_BODIES = {"LatentAttention": _LATENT, "Attention": _DENSE}


def function_text(name: str, rope_may_be_empty: bool = True) -> str:
    """The body of `ai.reattend::<name>` in ONNX's textual syntax."""
    header = _HEADER.format(domain=DOMAIN, opset=OPSET, name=name, inputs=", ".join(_INPUTS[name]))
    rope = _ROPE_OR_NONE if rope_may_be_empty else _ROPE
    return header + _BODIES[name].replace("SOFTMAX", _SOFTMAX).replace("ROPE", rope)


def function_proto(name: str, rope_may_be_empty: bool = True) -> Any:
    """`ai.reattend::<name>` version 1 as an `onnx.FunctionProto`.

    Args:
        name: `LatentAttention` (q_nope [B, H, N, r], q_rope [B, H, N, R], latent [B, C, r], rope
            [B, C, R], kv_start [B], kv_len [B]) -> y [B, H, N, r], or `Attention` (q [B, H, N, d],
            key [B, G, C, d], value [B, G, C, e], kv_start, kv_len) -> y [B, H, N, e].
        rope_may_be_empty: whether the latent body must work for R = 0.
    """
    import onnx.parser

    return onnx.parser.parse_function(function_text(name, rope_may_be_empty))
