"""Several queries and rows of any positions, region by region, in ONNX's textual syntax.

Positions count from the first real token, in int32, which is divided four times as fast as int64; a
row of padding sees itself, so that it stays finite.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from reattend.targets.onnx.fragments import ROWS_OF_HEAD, RUNS
from reattend.targets.onnx.pattern_terms import TERMS

#: start and lengths [B], and how far a block itself looks back
POSITIONS = """
  p0 = Constant <value: tensor = int32 {0}> ()
  p1 = Constant <value: tensor = int32 {1}> ()
  start = Cast <to = 6> (kv_start)
  lengths = Cast <to = 6> (kv_len)
  endless = Constant <value_int = 2147483647> ()
REACH"""

# The queries of each region read its own rows, and those that one of them may see by its first and
# last position; which they do see is looked at for those rows only, once for all heads. One region
# of one head after another meets its rows: scores stay in a processor's cache, and no region reads
# more rows than it needs. Scanned by text [B, ...], by region [R, ...], by KV head [G, ...].
#
# KEY [B, G, S, d] and VALUE [B, G, S, e] of rows at j_rows [B, S], far below 0 what none sees; at
# the times row_time [S], at any of the past those of other calls -> regions_y [B, H, N, e]
_BY_REGION = f"""
      n_32 = Cast <to = 6> (n)
      query = Range (p0, n_32, p1)
      before = Sub (lengths, n_32)
      before_b1 = Unsqueeze (before, axis_1)
      index_bn = Add (before_b1, query)
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
      rows_s = Shape (row_time)
      rows_s_int = Squeeze (rows_s, axis_0)
      rows_s_p = Cast <to = 6> (rows_s_int)
      row = Range (p0, rows_s_p, p1)
      as_y_head = Concat <axis = 0> (others, run_c_1, value_width_1)
      texts_y = Scan <
        body = of_text (text_q, text_key, text_value, text_start, text_index, j_r) => (text_y)
        {{
          text_y = Scan <
            body = of_region (region_q, region_index) => (region_y)
            {{
              first_index = ReduceMin <keepdims = 1> (region_index, axis_0)
              last_index = ReduceMax <keepdims = 1> (region_index, axis_0)
              first_any = Sub (first_index, text_start)
              i_r = Max (first_any, p0)
              last_r = Sub (last_index, text_start)
              apart_r = Sub (i_r, j_r)
              far_r = Sub (last_r, j_r)
REGION_TERMS
              real_r = GreaterOrEqual (j_r, p0)
              past_r = GreaterOrEqual (far_r, p0)
ALLOWED_R
              wanted_r = And (allowed_r, REGION_UNION)
              is_after_first = GreaterOrEqual (row_time, first_index)
              wanted_or_own = Or (wanted_r, is_after_first)
              read_r = And (wanted_or_own, past_r)
              rows = Compress <axis = 0> (row, read_r)
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
        num_scan_inputs = 6
      > (texts_q, KEY, VALUE, start, texts_index, j_rows)
      y_by_head = Transpose <perm = [0, 2, 3, 1, 4, 5]> (texts_y)
      heads_1 = Shape <start = 1, end = 2> (q)
      as_y = Concat <axis = 0> (texts_1, heads_1, others, value_width_1)
      y_runs = Reshape (y_by_head, as_y)
      regions_y = Slice (y_runs, same, n_1, axis_2)"""

# seen: what queries at i see of keys at j, apart from each other; all broadcast
_SEEN = """
      is_past = GreaterOrEqual (apart, p0)
      is_real = GreaterOrEqual (j, p0)
      past_real = And (is_past, is_real)
ALLOWED
TERMS
      wanted = And (allowed, UNION)
      itself = Equal (apart, p0)
      seen = Or (wanted, itself)"""

# how far a block itself looks back, where some node's has a window of its own; and where none has
_SLIDING = {
    "\nREACH": """
  own_any = Constant <value_int: int = @sliding_window> ()
  is_own = Greater (own_any, zero)
  reach_any = Where (is_own, own_any, endless)
  reach = Cast <to = 6> (reach_any)""",
    "\nFIRST": """
          farthest = Sub (text_end, reach)
          row_first = Max (row_0, farthest)""",
    "\nALLOWED_R": """
              near_r = Less (apart_r, reach)
              allowed_r = And (near_r, real_r)""",
    "\nALLOWED": """
      is_near = Less (apart, reach)
      allowed = And (past_real, is_near)""",
}
_ENDLESS = {
    "\nREACH": "",
    "\nFIRST": """
          row_first = Identity (row_0)""",
    "\nALLOWED_R": """
              allowed_r = Identity (real_r)""",
    "\nALLOWED": """
      allowed = Identity (past_real)""",
}


def renamed(text: str, end: str) -> str:
    """The lines of a term with `end` behind the names of its values and positions."""
    names = {*re.findall(r"^\s*(\w+) =", text, re.MULTILINE), "i", "j", "apart"}
    return re.sub(r"(?<!@)\b(\w+)\b", lambda m: m[0] + end * (m[0] in names), text)


def union(lines: dict[str, str], end: str = "") -> tuple[str, str]:
    """The lines of terms, and the name of their union."""
    text, (union, *others) = "".join(lines.values()), lines
    union += end
    for name in others:
        text += f"\n  {union}_or_{name} = Or ({union}, {name}{end})"
        union = f"{union}_or_{name}"
    return text, union


def by_region(key: str, value: str) -> str:
    """Lines for several queries; `filled` completes them.

    Args:
        key, value: names of the rows.
    """
    return _BY_REGION.replace("KEY", key).replace("VALUE", value)


def filled(body: str, terms: Collection[str], sliding: bool) -> str:
    """A body with what terms say in the places of ONCE, TERMS, UNION, REGION_TERMS and SEEN.

    Args:
        body: with `POSITIONS`.
        terms: those of `TERMS` that some node has.
        sliding: the block of some node may have a window of its own.
    """
    other = "window" if "window_slope" in terms else "window_slope"  # one of both, for every node
    shown = {"window", "window_slope", *terms} - {other}
    used = {name: term for name, term in TERMS.items() if name in shown}
    own, union_own = union({n: term.seen for n, term in used.items()})
    first = {n: term.region or renamed(term.seen, "_r") for n, term in used.items()}
    of_region, union_r = union(first, "_r")
    body = body.replace("\nREGION_TERMS", of_region).replace("REGION_UNION", union_r)
    body = body.replace("\nONCE", "".join(term.once for term in used.values()))
    body = body.replace("\nSEEN", _SEEN)
    for word, lines in (_SLIDING if sliding else _ENDLESS).items():
        body = body.replace(word, lines)
    return body.replace("\nTERMS", own).replace("UNION", union_own)
