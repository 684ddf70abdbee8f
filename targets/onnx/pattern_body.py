"""The body of `PatternAttention` in ONNX's textual syntax: any union of terms, standard operators.

The state holds every row. Which of them queries see is computed from positions, and only those are
gathered, of one token or of a region of queries: a decode step reads what its pattern shows, but
nothing is forgotten.
"""

from __future__ import annotations

from collections.abc import Collection

from reattend.targets.onnx.fragments import finished
from reattend.targets.onnx.pattern_regions import POSITIONS, QUERIES, by_region, filled
from reattend.targets.onnx.pattern_terms import TERMS

_PATTERN = """PatternAttention
<scale: float, sliding_window: int = 0, softcap: float = 0.0, sinks: int = 0, window: int = 0,
 window_slope: tensor, stride: ints, powers: int = 0, columns: ints, slashes: ints>
(q, key, value, kv_start, kv_len) => (y)
{
SIZES
POSITIONS
ONCE
  is_step = Equal (n, one)
  y = If (is_step) <
    then_branch = step () => (step_y)
    {
STEP
    },
    else_branch = several () => (regions_y)
    {
      m_1 = Shape <start = 2, end = 3> (key)
      m_any = Squeeze (m_1, axis_0)
      m = Cast <to = 6> (m_any)
      row_time = Range (p0, m, p1)
QUERIES
      j_rows = Sub (row_time, start_b1)
BY_REGION
    }
  >
}"""

# One token: of a text, all that it sees is read and nothing of it hidden. By text, by KV head.
_STEP = """
      by_group = Concat <axis = 0> (same, g, others, same)
      q_rows = Reshape (q, by_group)
      q_scaled = Mul (q_rows, factor)
      last_b = Sub (lengths, p1)
      texts_y = Scan <
        body = of_text (text_q, text_key, text_value, text_start, text_last, text_end) => (text_y)
        {
          row_0 = Min (text_start, text_last)
FIRST
          row = Range (row_first, text_end, p1)
          i = Sub (text_last, row_0)
          j = Sub (row, row_0)
          apart = Sub (text_last, row)
TERMS
          rows = Compress <axis = 0> (row, UNION)
          text_y = Scan <
            body = of_head (head_q, head_key, head_value) => (head_y)
            {
              read_key = Gather (head_key, rows)
              read_value = Gather (head_value, rows)
              key_t = Transpose <perm = [1, 0]> (read_key)
              scores_any = MatMul (head_q, key_t)
              scores = Cast <to = 1> (scores_any)
CAPPED
              weights_float = Softmax <axis = -1> (capped)
              weights = CastLike (weights_float, scores_any)
              head_y = MatMul (weights, read_value)
            },
            num_scan_inputs = 3
          > (text_q, text_key, text_value)
        },
        num_scan_inputs = 6
      > (q_scaled, key, value, start, last_b, lengths)
      as_step_y = Constant <value_ints = [0, -1, 1, 0]> ()
      step_y = Reshape (texts_y, as_step_y)"""


def pattern_body(
    terms: Collection[str] = tuple(TERMS), capped: bool = True, sliding: bool = True
) -> str:
    """`PatternAttention` without the domain's line.

    Args:
        terms: those of `TERMS` that some node has.
        capped: some node may have a softcap.
        sliding: the block of some node may have a window of its own.
    """
    body = _PATTERN.replace("\nPOSITIONS", POSITIONS).replace("\nSTEP", _STEP)
    body = body.replace("\nQUERIES", QUERIES)
    body = filled(body.replace("\nBY_REGION", by_region("key", "value")), terms, sliding)
    return finished(body, capped)
