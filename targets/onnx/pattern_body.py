"""The body of `PatternAttention` in ONNX's textual syntax: any union of terms, standard operators.

The state holds every row. Which of them queries see is computed from positions, and only those are
gathered, for few queries of a short text together and else by regions of queries: a decode step
reads what its pattern shows, but nothing is forgotten.

Positions count from the first real token; a row of padding sees itself, so that it stays finite.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from reattend.targets.onnx.fragments import ROWS_OF_HEAD, RUNS, every_score, finished
from reattend.targets.onnx.pattern_terms import TERMS

#: rows of a state up to which a call of few queries is quicker in one piece
SHORT = 2048

_PATTERN = """PatternAttention
<scale: float, sliding_window: int = 0, softcap: float = 0.0, sinks: int = 0, window: int = 0,
 window_slope: tensor, stride: ints, powers: int = 0, columns: ints, slashes: ints>
(q, key, value, kv_start, kv_len) => (y)
{
COMMON
ONCE
  axes_01 = Constant <value_ints = [0, 1]> ()
  m_1 = Shape <start = 2, end = 3> (key)
  m = Squeeze (m_1, axis_0)
  start_b1 = Unsqueeze (start, axis_1)
  length_b1 = Unsqueeze (lengths, axis_1)
  query = Range (zero, n, one)
  before = Sub (length_b1, n)
  index_bn = Add (before, query)
  row = Range (zero, m, one)
  j_bm = Sub (row, start_b1)
  j_b1m = Unsqueeze (j_bm, axis_1)
  few = Constant <value_int = @TILE> ()
  short = Constant <value_int = @SHORT> ()
  is_many = Less (few, n)
  is_far = Less (short, m)
  is_long = Or (is_many, is_far)
  y = If (is_long) <
    then_branch = by_region () => (regions_y)
    {
BY_REGION
    },
    else_branch = together () => (together_y)
    {
TOGETHER
    }
  >
}"""

# all queries of the call read what one of them sees
_TOGETHER = """
      index = Unsqueeze (index_bn, axis_2)
      i_bn = Sub (index_bn, start_b1)
      i = Unsqueeze (i_bn, axis_2)
      j = Identity (j_b1m)
      apart = Sub (index, row)
SEEN
      seen_int = Cast <to = 6> (seen)
      seen_by_any = ReduceMax <keepdims = 0> (seen_int, axes_01)
      is_seen = Cast <to = 9> (seen_by_any)
      read_1 = NonZero (is_seen)
      read = Squeeze (read_1, axis_0)
      seen_read = Gather <axis = 2> (seen, read)
      read_key = Gather <axis = 2> (key, read)
      read_value = Gather <axis = 2> (value, read)
      visible = Unsqueeze (seen_read, axis_1)"""
_OUTPUT = every_score("read_key", "read_value", "together_y")

# The queries of each region read its own rows, and those that one of them may see by its first and
# last position; which they do see is looked at for those rows only, once for all heads. One region
# of one head after another meets its rows: scores stay in a processor's cache, and no region reads
# more rows than it needs. Scanned by text [B, ...], by region [R, ...], by KV head [G, ...].
_BY_REGION = f"""
      run_most = Constant <value_int = @TILE> (){RUNS}
      index_run = Gather <axis = 1> (index_bn, run_at)
      as_index_run = Concat <axis = 0> (same, runs_1, run_c_1)
      texts_index = Reshape (index_run, as_index_run)
      texts_1 = Shape <start = 0, end = 1> (q)
      width_1 = Shape <start = 3, end = 4> (q)
      as_groups = Concat <axis = 0> (texts_1, g, others, runs_1, run_c_1, width_1)
      q_groups = Reshape (q_regions, as_groups)
      q_by_region = Transpose <perm = [0, 3, 1, 2, 4, 5]> (q_groups)
      texts_q = Mul (q_by_region, factor)
      q_flat = Concat <axis = 0> (others, width_1)
      value_width_1 = Shape <start = 3, end = 4> (value)
      as_y_head = Concat <axis = 0> (others, run_c_1, value_width_1)
      texts_y = Scan <
        body = of_text (text_q, text_key, text_value, text_start, text_index) => (text_y)
        {{
          j_r = Sub (row, text_start)
          text_y = Scan <
            body = of_region (region_q, region_index) => (region_y)
            {{
              first_index = ReduceMin <keepdims = 1> (region_index, axis_0)
              last_index = ReduceMax <keepdims = 1> (region_index, axis_0)
              first_any = Sub (first_index, text_start)
              i_r = Max (first_any, zero)
              last_r = Sub (last_index, text_start)
              apart_r = Sub (i_r, j_r)
              far_r = Sub (last_r, j_r)
REGION_TERMS
              real_r = GreaterOrEqual (j_r, zero)
              past_r = GreaterOrEqual (far_r, zero)
              near_r = Less (apart_r, reach)
              allowed_r = And (near_r, real_r)
              wanted_r = And (allowed_r, REGION_UNION)
              is_after_first = GreaterOrEqual (row, first_index)
              wanted_or_own = Or (wanted_r, is_after_first)
              read_r = And (wanted_or_own, past_r)
              rows_1 = NonZero (read_r)
              rows = Squeeze (rows_1, axis_0)
              rows_many = Shape (rows)
              index_c1 = Unsqueeze (region_index, axis_1)
              i = Sub (index_c1, text_start)
              j = Gather (j_r, rows)
              apart = Sub (i, j)
SEEN
              visible = Identity (seen)
BIAS
              as_scores = Concat <axis = 0> (others, run_c_1, rows_many)
              as_weights = Concat <axis = 0> (others, rows_many)
              region_y = Scan <
                body = of_head (head_q, head_key, head_value) => (head_y)
                {{{ROWS_OF_HEAD.replace("HOW", "BY_BIAS")}
                }},
                num_scan_inputs = 3
              > (region_q, text_key, text_value)
            }},
            num_scan_inputs = 2
          > (text_q, text_index)
        }},
        num_scan_inputs = 5
      > (texts_q, key, value, start, texts_index)
      y_by_head = Transpose <perm = [0, 2, 3, 1, 4, 5]> (texts_y)
      heads_1 = Shape <start = 1, end = 2> (q)
      as_y = Concat <axis = 0> (texts_1, heads_1, others, value_width_1)
      y_runs = Reshape (y_by_head, as_y)
      regions_y = Slice (y_runs, same, n_1, axis_2)"""

# seen: what queries at i see of keys at j, apart from each other; all broadcast
_SEEN = """
      is_past = GreaterOrEqual (apart, zero)
      is_real = GreaterOrEqual (j, zero)
      is_near = Less (apart, reach)
      past_real = And (is_past, is_real)
      allowed = And (past_real, is_near)
TERMS
      wanted = And (allowed, UNION)
      itself = Equal (apart, zero)
      seen = Or (wanted, itself)"""


def _of_region(text: str) -> str:
    """The lines of a term for the first query of a region."""
    names = {*re.findall(r"^\s*(\w+) =", text, re.MULTILINE), "i", "j", "apart"}
    return re.sub(r"(?<!@)\b(\w+)\b", lambda m: m[0] + "_r" * (m[0] in names), text)


def _union(lines: dict[str, str], end: str = "") -> tuple[str, str]:
    """The lines of terms, and the name of their union."""
    text, (union, *others) = "".join(lines.values()), lines
    union += end
    for name in others:
        text += f"\n  {union}_or_{name} = Or ({union}, {name}{end})"
        union = f"{union}_or_{name}"
    return text, union


def pattern_body(terms: Collection[str] = tuple(TERMS), capped: bool = True) -> str:
    """`PatternAttention` without the domain's line.

    Args:
        terms: those of `TERMS` that some node has; at least one.
        capped: some node may have a softcap.
    """
    used = {name: term for name, term in TERMS.items() if name in terms}
    own, union = _union({n: term.seen for n, term in used.items()})
    first = {n: term.region or _of_region(term.seen) for n, term in used.items()}
    of_region, region_union = _union(first, "_r")
    body = _PATTERN.replace("\nBY_REGION", _BY_REGION).replace("\nTOGETHER", _TOGETHER + _OUTPUT)
    body = body.replace("\nREGION_TERMS", of_region).replace("REGION_UNION", region_union)
    body = body.replace("\nONCE", "".join(term.once for term in used.values()))
    body = body.replace("@SHORT", str(SHORT)).replace("\nSEEN", _SEEN)
    body = body.replace("\nTERMS", own).replace("UNION", union)
    return finished(body, capped, lifted=False)  # few of the rows read are hidden from a query
