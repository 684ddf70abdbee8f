"""Several queries and rows of any positions, region by region, in ONNX's textual syntax.

Positions count from the first real token, in int32, which is divided four times as fast as int64.
With caches a row of padding sees itself, so that it stays finite. Letters: B texts, H query heads,
G KV heads, J query heads of each, N queries, S rows, R regions of c queries, K rows that one reads,
d and e widths.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from reattend.targets.onnx.fragments import ROWS_OF_HEAD, RUNS
from reattend.targets.onnx.pattern_terms import TERMS, Term

#: start and lengths [B], and how far a block itself looks back
POSITIONS = """
  p0 = Constant <value: tensor = int32 {0}> ()
  p1 = Constant <value: tensor = int32 {1}> ()
  start = Cast <to = 6> (kv_start)
  lengths = Cast <to = 6> (kv_len)
REACH"""

#: start_b1 [B, 1], and where the queries of a call stand: i_bn [B, N]
QUERIES = """
      n_p = Cast <to = 6> (n)
      query = Range (p0, n_p, p1)
      start_b1 = Unsqueeze (start, axis_1)
      length_b1 = Unsqueeze (lengths, axis_1)
      before = Sub (length_b1, n_p)
      first_b1 = Sub (before, start_b1)
      i_bn = Add (first_b1, query)"""

# The queries of each region read its own rows, and those that one of them may see by its first and
# last position; which they do see is looked at for those rows only, once for all heads. One region
# of one head after another meets its rows: scores stay in a processor's cache, and no region reads
# more rows than it needs. Scanned by text [B, ...], by region [R, ...], by KV head [G, ...].
#
# q at i_bn [B, N], KEY [B, G, S, d] and VALUE [B, G, S, e] of rows at j_rows [B, S], far below 0
# what none sees -> regions_y [B, H, N, e]
_BY_REGION = f"""
      run_most = Constant <value_int = @TILE> (){RUNS}
      i_run = Gather <axis = 1> (i_bn, run_at)
      as_i_run = Concat <axis = 0> (same, runs_1, run_c_1)
      texts_i = Reshape (i_run, as_i_run)
      texts_1 = Shape <start = 0, end = 1> (q)
      width_1 = Shape <start = 3, end = 4> (q)
      as_groups = Concat <axis = 0> (texts_1, g, others, runs_1, run_c_1, width_1)
      q_groups = Reshape (q_regions, as_groups)
      q_by_region = Transpose <perm = [0, 3, 1, 2, 4, 5]> (q_groups)
      texts_q = Mul (q_by_region, factor)
      q_flat = Concat <axis = 0> (others, width_1)
      value_width_1 = Shape <start = 3, end = 4> (value)
      rows_s = Shape <start = 1> (j_rows)
      rows_s_int = Squeeze (rows_s, axis_0)
      rows_s_p = Cast <to = 6> (rows_s_int)
      row = Range (p0, rows_s_p, p1)
      as_y_head = Concat <axis = 0> (others, run_c_1, value_width_1)
      texts_y = Scan <
        body = of_text (text_q, text_key, text_value, text_i, j_r) => (text_y)
        {{
          text_y = Scan <
            body = of_region (region_q, region_i) => (region_y)
            {{
              first_any = ReduceMin <keepdims = 1> (region_i, axis_0)
              last_r = ReduceMax <keepdims = 1> (region_i, axis_0)
              i_r = Max (first_any, p0)
              apart_r = Sub (i_r, j_r)
              far_r = Sub (last_r, j_r)
REGION_TERMS
              real_r = GreaterOrEqual (j_r, p0)
READ
              rows = Compress <axis = 0> (row, read_r)
              rows_many = Shape (rows)
              i = Unsqueeze (region_i, axis_1)
              j = Gather (j_r, rows)
              apart = Sub (i, j)
SEEN
              visible = Identity (seen)
MANY_BIAS
              as_scores = Concat <axis = 0> (others, run_c_1, rows_many)
              as_weights = Concat <axis = 0> (others, rows_many)
              region_y = Scan <
                body = of_head (head_q, head_key, head_value) => (head_y)
                {{{ROWS_OF_HEAD}
                }},
                num_scan_inputs = 3
              > (region_q, text_key, text_value)
            }},
            num_scan_inputs = 2
          > (text_q, text_i)
        }},
        num_scan_inputs = 5
      > (texts_q, KEY, VALUE, texts_i, j_rows)
      y_by_head = Transpose <perm = [0, 2, 3, 1, 4, 5]> (texts_y)
      heads_1 = Shape <start = 1, end = 2> (q)
      as_y = Concat <axis = 0> (texts_1, heads_1, others, value_width_1)
      y_runs = Reshape (y_by_head, as_y)
      regions_y = Slice (y_runs, same, n_1, axis_2)"""

# read_r: rows that a region reads. Its own ones among them, they lie at its positions.
# seen: what queries at i see of keys at j, apart from each other; all broadcast
_CAUSAL = {
    "\nREAD": """
              past_r = GreaterOrEqual (far_r, p0)
ALLOWED_R
              wanted_r = And (allowed_r, REGION_UNION)
              is_after_first = GreaterOrEqual (j_r, first_any)
              wanted_or_own = Or (wanted_r, is_after_first)
              read_r = And (wanted_or_own, past_r)""",
    "\nSEEN": """
      is_past = GreaterOrEqual (apart, p0)
      is_real = GreaterOrEqual (j, p0)
      past_real = And (is_past, is_real)
ALLOWED
TERMS
      wanted = And (allowed, UNION)
      itself = Equal (apart, p0)
      seen = Or (wanted, itself)""",
}

# the same without an order of tokens; the first row is always read, so that none reads nothing
_BOTH_WAYS = {
    "\nREAD": """
              wanted_r = And (real_r, REGION_UNION)
              is_first_row = Equal (row, p0)
              read_r = Or (wanted_r, is_first_row)""",
    "\nSEEN": """
      is_real = GreaterOrEqual (j, p0)
TERMS
      seen = And (is_real, UNION)""",
}

# how far a block itself looks back, where some node's has a window of its own; and where none has
_SLIDING = {
    "\nREACH": """
  own_any = Constant <value_int: int = @sliding_window> ()
  is_own = Greater (own_any, zero)
  endless = Constant <value_int = 2147483647> ()
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
    """A body with lines in the places of what terms say (ONCE, TERMS, UNION, REGION_TERMS), of what
    is read and seen (READ, SEEN) and of a block's own window (REACH, FIRST, ALLOWED, ALLOWED_R).

    Args:
        body: with `POSITIONS`.
        terms: those of `TERMS` that some node has.
        sliding: the block of some node may have a window of its own.
    """
    other = "window" if "window_slope" in terms else "window_slope"  # one of both, for every node
    shown = {"window", "window_slope", *terms} - {other}
    rules = {**_CAUSAL, **(_SLIDING if sliding else _ENDLESS)}
    return _with_terms(body, {name: term for name, term in TERMS.items() if name in shown}, rules)


def filled_both_ways(body: str, terms: dict[str, Term]) -> str:
    """The same for tokens without an order, which see these terms on either side of them; without
    `POSITIONS`, but for p0 and p1."""
    return _with_terms(body, terms, _BOTH_WAYS)


def _with_terms(body: str, terms: dict[str, Term], rules: dict[str, str]) -> str:
    own, union_own = union({n: term.seen for n, term in terms.items()})
    first = {n: term.region or renamed(term.seen, "_r") for n, term in terms.items()}
    of_region, union_r = union(first, "_r")
    for word, lines in rules.items():
        body = body.replace(word, lines)
    body = body.replace("\nREGION_TERMS", of_region).replace("REGION_UNION", union_r)
    body = body.replace("\nONCE", "".join(term.once for term in terms.values()))
    return body.replace("\nTERMS", own).replace("UNION", union_own)
