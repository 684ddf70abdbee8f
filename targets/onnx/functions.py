"""The meaning of our nodes in standard ops: one function body each, attached to every model.

The text below is ONNX's own textual syntax; the bodies of the sparse nodes are in `sparse_body.py`,
`pattern_body.py` and `selected_body.py`, that of routed heads in `routed_body.py`, those of linear
attention in `linear_body.py` and `window_linear_body.py`. Both bodies here take the *row-wise*
form: the query heads that share keys become rows of one matrix product, so a decode step reads the
cache once and not once per head (on a CPU 2 to 3 times faster than the Attention op for latent
rows). Only standard operators are used, so any runtime runs the file; a kernel registered for the
node's name takes over where one is loaded.

Where some layer has no rotary part (R = 0) the latent body branches on it, because a product over
zero columns is not zero in ONNX Runtime 1.31 (its fused transposed MatMul leaves the output unset).
Elsewhere the branch is left out: it cannot fold, and costs a subgraph call per layer.

Semantics are those of `reattend::attention`: query i is at index kv_len - N + i and sees key j iff
kv_start <= j < kv_len, j <= index (causal) and index - j < sliding_window (if > 0). A query that
sees nothing gives 0. Rows outside [kv_start, kv_len) must hold finite numbers: their weight is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reattend.targets.onnx.encoder_body import ENCODER, encoder_body
from reattend.targets.onnx.encoder_observed import OBSERVED, observed_body
from reattend.targets.onnx.fragments import CAP, CAPPED
from reattend.targets.onnx.gated_linear_body import GATED, gated_linear_body
from reattend.targets.onnx.kept_body import KEPT, kept_body
from reattend.targets.onnx.linear_body import linear_body
from reattend.targets.onnx.linear_features import MAPS
from reattend.targets.onnx.pattern_body import pattern_body
from reattend.targets.onnx.pattern_terms import TERMS
from reattend.targets.onnx.routed_body import NAME as ROUTED
from reattend.targets.onnx.routed_body import routed_body
from reattend.targets.onnx.selected_body import SELECTED, selected_body
from reattend.targets.onnx.selected_choice import BUDGETS
from reattend.targets.onnx.sparse_body import sparse_body
from reattend.targets.onnx.window_linear_body import window_linear_body

DOMAIN = "ai.reattend"
VERSION = 1
OPSET = 24

_DOMAIN_LINE = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
_OWN_DOMAIN_LINE = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>\n'
_HEADER = """{name} <scale: float, causal: int = 1, sliding_window: int = 0, softcap: float = 0.0>
({inputs}) => (y)
"""

_LATENT = """{
  n = Shape <start = 2, end = 3> (q_nope)
  m = Shape <start = 1, end = 2> (latent)
  r = Shape <start = 2, end = 3> (latent)
  same = Constant <value_ints = [0]> ()
  others = Constant <value_ints = [-1]> ()
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q_nope)
  rows_of_r = Concat <axis = 0> (same, others, r)
  nope_rows = Reshape (q_nope, rows_of_r)
  nope_scaled = Mul (nope_rows, factor)
  latent_t = Transpose <perm = [0, 2, 1]> (latent)
  nope_scores = MatMul (nope_scaled, latent_t)
ROPE
  score_shape = Concat <axis = 0> (same, others, n, m)
SOFTMAX
  rows_of_m = Concat <axis = 0> (same, others, m)
  weight_rows = Reshape (weights, rows_of_m)
  y_rows = MatMul (weight_rows, latent)
  y_shape = Concat <axis = 0> (same, others, n, r)
  y_any = Reshape (y_rows, y_shape)
  y = Where (alive, y_any, nothing)
}"""

_DENSE = """{
  n = Shape <start = 2, end = 3> (q)
  m = Shape <start = 2, end = 3> (key)
  g = Shape <start = 1, end = 2> (key)
  same = Constant <value_ints = [0]> ()
  others = Constant <value_ints = [-1]> ()
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q)
  by_group = Concat <axis = 0> (same, g, others, same)
  q_scaled = Mul (q, factor)
  q_rows = Reshape (q_scaled, by_group)
  key_t = Transpose <perm = [0, 1, 3, 2]> (key)
  score_rows = MatMul (q_rows, key_t)
  score_shape = Concat <axis = 0> (same, others, n, same)
SOFTMAX
  weight_rows = Reshape (weights, by_group)
  y_rows = MatMul (weight_rows, value)
  y_any = Reshape (y_rows, score_shape)
  y = Where (alive, y_any, nothing)
}"""

_ROPE = """
  rotary = Shape <start = 2, end = 3> (rope)
  rows_of_rotary = Concat <axis = 0> (same, others, rotary)
  rope_rows = Reshape (q_rope, rows_of_rotary)
  rope_scaled = Mul (rope_rows, factor)
  rope_t = Transpose <perm = [0, 2, 1]> (rope)
  rope_scores = MatMul (rope_scaled, rope_t)
  score_rows = Add (nope_scores, rope_scores)"""

_ROPE_OR_NONE = """
  rotary = Shape <start = 2, end = 3> (rope)
  no_columns = Constant <value_int = 0> ()
  is_rotary = Greater (rotary, no_columns)
  score_rows = If (is_rotary) <
    then_branch = with_rope () => (then_rows)
    {
      rows = Shape <start = 0, end = 2> (nope_rows)
      rows_of_rotary = Concat <axis = 0> (rows, rotary)
      rope_rows = Reshape <allowzero = 1> (q_rope, rows_of_rotary)
      rope_scaled = Mul (rope_rows, factor)
      rope_t = Transpose <perm = [0, 2, 1]> (rope)
      rope_scores = MatMul (rope_scaled, rope_t)
      then_rows = Add (nope_scores, rope_scores)
    },
    else_branch = without_rope () => (else_rows)
    {
      else_rows = Identity (nope_scores)
    }
  >"""

# score_rows -> weights [b, h, n, m] in their dtype; alive [b, 1, n, 1], false where a query sees
# nothing; and the number 0. The softmax is in float32.
_SOFTMAX = """
  scores_own = Reshape (score_rows, score_shape)
  scores = Cast <to = 1> (scores_own)
CAP
CAPPED
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_13 = Constant <value_ints = [1, 3]> ()
  start_any = Cast <to = 7> (kv_start)
  length_any = Cast <to = 7> (kv_len)
  start_b1 = Unsqueeze (start_any, axis_1)
  length_b1 = Unsqueeze (length_any, axis_1)
  n_scalar = Squeeze (n, axis_0)
  m_scalar = Squeeze (m, axis_0)
  query = Range (zero, n_scalar, one)
  before = Sub (length_b1, n)
  index_bn = Add (before, query)
  causal_int = Constant <value_int: int = @causal> ()
  is_causal = Greater (causal_int, zero)
  last_bn = If (is_causal) <
    then_branch = up_to_itself () => (then_last)
    {
      then_last = Identity (index_bn)
    },
    else_branch = up_to_the_end () => (else_last)
    {
      else_last = Sub (length_b1, one)
    }
  >
  window = Constant <value_int: int = @sliding_window> ()
  has_window = Greater (window, zero)
  first_bn = If (has_window) <
    then_branch = from_the_window () => (then_first)
    {
      window_less = Sub (window, one)
      window_start = Sub (index_bn, window_less)
      then_first = Max (window_start, start_b1)
    },
    else_branch = from_the_start () => (else_first)
    {
      else_first = Identity (start_b1)
    }
  >
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
  nothing = CastLike (zero_float, score_rows)
"""

_INPUTS = {
    "LatentAttention": ("q_nope", "q_rope", "latent", "rope", "kv_start", "kv_len"),
    "Attention": ("q", "key", "value", "kv_start", "kv_len"),
}
_BODIES = {"LatentAttention": _LATENT, "Attention": _DENSE}


@dataclass(frozen=True)
class Uses:
    """What the nodes of one file need of their bodies; the rest is left out.

    Attributes:
        rope_may_be_empty: some latent node has R = 0.
        terms: terms that some `PatternAttention` or `KeptAttention` has.
        budgets: budgets that some node of `selected_body` has.
        capped: some node that is sparse or routed has a softcap.
        sliding: the block of some node has a window of its own.
        decayed: some node of linear attention has decays.
        maps: feature maps that some `WindowLinearAttention` has.
    """

    rope_may_be_empty: bool = True
    terms: tuple[str, ...] = tuple(TERMS)
    budgets: tuple[str, ...] = tuple(BUDGETS)
    capped: bool = True
    sliding: bool = True
    decayed: bool = True
    maps: tuple[str, ...] = MAPS


EVERYTHING = Uses()


#: nodes whose bodies call another of ours
CALLS = {ROUTED: "Attention"}


def with_called(names: set[str]) -> list[str]:
    """The functions a file with these nodes needs, sorted."""
    return sorted(names | {CALLS[name] for name in names if name in CALLS})


def function_text(name: str, uses: Uses = EVERYTHING) -> str:
    """The body of `ai.reattend::<name>` in ONNX's textual syntax."""
    if name == "SparseAttention":
        return _DOMAIN_LINE + sparse_body(uses.capped)
    if name == "PatternAttention":
        return _DOMAIN_LINE + pattern_body(uses.terms, uses.capped, uses.sliding)
    if name == KEPT:
        return _DOMAIN_LINE + kept_body(uses.terms, uses.capped, uses.sliding)
    if name == ROUTED:
        return _OWN_DOMAIN_LINE + routed_body(uses.capped)
    if name == "LinearAttention":
        return _DOMAIN_LINE + linear_body(uses.decayed)
    if name == GATED:
        return _DOMAIN_LINE + gated_linear_body()
    if name == "WindowLinearAttention":
        return _DOMAIN_LINE + window_linear_body(uses.decayed, uses.maps)
    if name in SELECTED:
        return _DOMAIN_LINE + selected_body(name, uses.budgets, uses.capped)
    if name in ENCODER:
        return _DOMAIN_LINE + encoder_body(name, uses.capped)
    if name == OBSERVED:
        return _DOMAIN_LINE + observed_body(uses.capped)
    header = _HEADER.format(name=name, inputs=", ".join(_INPUTS[name]))
    rope = _ROPE_OR_NONE if uses.rope_may_be_empty else _ROPE
    body = _BODIES[name].replace("SOFTMAX", _SOFTMAX).replace("ROPE", rope)
    body = body.replace("CAPPED", CAPPED).replace("CAP", CAP)
    return _DOMAIN_LINE + header + body


def function_proto(name: str, uses: Uses = EVERYTHING) -> Any:
    """`ai.reattend::<name>` version 1 as an `onnx.FunctionProto`.

    Args:
        name: `LatentAttention` (q_nope [B, H, N, r], q_rope [B, H, N, R], latent [B, C, r], rope
            [B, C, R], kv_start [B], kv_len [B]) -> y [B, H, N, r], `Attention` (q [B, H, N, d],
            key [B, G, C, d], value [B, G, C, e], kv_start, kv_len) -> y [B, H, N, e],
            `PatternAttention` (the same inputs), `RoutedAttention` (the same and, before kv_start,
            active [B, U, N]; it calls `Attention`), or `SparseAttention` (q, key [B, G, N, d],
            value [B, G, N, e], past_key [B, G, sinks + window, d], past_value, kv_start, kv_len)
            -> y, present_key, present_value, or `KeptAttention` (the same with ring_key,
            ring_value, kept_key, kept_value as states); or one of `selected_body.KINDS`,
            of `linear_body.LINEAR`, or of `encoder_body.ENCODER`.
        uses: what the nodes of the file need.
    """
    import onnx.parser

    return onnx.parser.parse_function(function_text(name, uses))
