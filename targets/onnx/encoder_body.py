"""The bodies of nodes of models without states, in ONNX's textual syntax.

Which keys are read is said by inputs: what a pattern shows, or what was chosen before in the graph.
`MaskedAttention` takes any mask (`encoder_masked.py`). The others read, for every region of
queries, listed rows: `RegionAttention` the same ones in all heads and texts,
`ChosenRegionAttention` rows of each head's own, and `BandAttention` (`encoder_band.py`) those near
in the text. One region of one head comes after another: scores stay in the processor's cache, and
a box reads as many rows as it needs.
Letters: B batch, H query heads, G key/value heads, J = H / G, N queries, M keys, R regions, c
queries and K keys of a region, d and e widths.
"""

from __future__ import annotations

from reattend.targets.onnx.encoder_band import BAND, BAND_BODY
from reattend.targets.onnx.encoder_masked import masked
from reattend.targets.onnx.fragments import OWN_ROWS, ROWS_OF_HEAD, ROWS_TOGETHER, finished

_START = """NAME <scale: float, softcap: floatMORE>
(INPUTS) => (y)
{
SIZES
"""

# a span [3]: where a region's rows begin and end among key_rows, and where its mask begins in seen.
# Scanned by region [R, ...], and inside by KV head [B G, ...].
_REGIONS = """
  c_1 = Shape <start = 1, end = 2> (query_rows)
  two = Constant <value_ints = [2]> ()
  three = Constant <value_ints = [3]> ()
  batch_1 = Shape <start = 0, end = 1> (q)
  heads_1 = Shape <start = 1, end = 2> (q)
  q_sizes = Shape <start = 2> (q)
  key_sizes = Shape <start = 2> (key)
  value_sizes = Shape <start = 2> (value)
  width_1 = Shape <start = 3, end = 4> (q)
  value_width_1 = Shape <start = 3, end = 4> (value)
  pairs_1 = Mul (batch_1, g)
  as_q_pairs = Concat <axis = 0> (pairs_1, others, q_sizes)
  as_key_pairs = Concat <axis = 0> (pairs_1, key_sizes)
  as_value_pairs = Concat <axis = 0> (pairs_1, value_sizes)
  q_factored = Mul (q, factor)
  q_pairs = Reshape (q_factored, as_q_pairs)
  key_pairs = Reshape (key, as_key_pairs)
  value_pairs = Reshape (value, as_value_pairs)
  q_flat = Concat <axis = 0> (others, width_1)
  as_y_head = Concat <axis = 0> (others, c_1, value_width_1)
  as_y_region = Concat <axis = 0> (batch_1, heads_1, c_1, value_width_1)
  y_first = Scan <
    body = of_a_region (int64[c] own_queries, int64[s] span) => (y_region)
    {
      rows_from = Slice (span, axis_0, axis_1)
      rows_until = Slice (span, axis_1, two)
      seen_from = Slice (span, two, three)
      rows = Slice (key_rows, rows_from, rows_until)
      own_many = Sub (rows_until, rows_from)
      seen_many = Mul (own_many, c_1)
      seen_until = Add (seen_from, seen_many)
      seen_flat = Slice (seen, seen_from, seen_until)
      by_query = Concat <axis = 0> (c_1, own_many)
      visible = Reshape (seen_flat, by_query)
MANY_BIAS
      as_scores = Concat <axis = 0> (others, by_query)
      as_weights = Concat <axis = 0> (others, own_many)
      y_of_pairs = Scan <
        body = of_a_pair (pair_q, head_key, head_value) => (head_y)
        {
          head_q = Gather <axis = 1> (pair_q, own_queries)HEAD
        },
        num_scan_inputs = 3
      > (q_pairs, key_pairs, value_pairs)
      y_region = Reshape (y_of_pairs, as_y_region)
    },
    num_scan_inputs = 2
  > (query_rows, spans)""".replace("HEAD", ROWS_OF_HEAD)

_CHOSEN = f"""{ROWS_TOGETHER}
  rows_first = Transpose <perm = [2, 0, 1, 3]> (key_rows)
  seen_some = Transpose <perm = [2, 0, 1, 3, 4]> (seen)
  r_1 = Shape <start = 0, end = 1> (query_rows)
  each_1 = Constant <value_ints = [1, 1, 1, 1]> ()
  by_region = Concat <axis = 0> (r_1, each_1)
  seen_first = Expand (seen_some, by_region)
  y_first = Scan <
    body = of_a_region (
      int64[c] own_queries, int64[b, h, k] rows_in, bool[sb, sh, sc, sk] own_seen
    ) => (y_region)
    {{
      own_q = Gather <axis = 2> (q, own_queries){OWN_ROWS}
    }},
    num_scan_inputs = 3
  > (query_rows, rows_first, seen_first)"""

_END = """
  y_regions = Transpose <perm = [1, 2, 0, 3, 4]> (y_first)
  e_1 = Shape <start = 3, end = 4> (value)
  flat = Concat <axis = 0> (same, same, others, e_1)
  y_flat = Reshape (y_regions, flat)
  y = Gather <axis = 2> (y_flat, at)
}"""

_ROWS = ("q", "key", "value", "query_rows", "key_rows", "seen")
#: inputs of each node
ENCODER = {
    "MaskedAttention": ("q", "key", "value", "seen"),
    "RegionAttention": (*_ROWS, "spans", "at"),
    "ChosenRegionAttention": (*_ROWS, "at"),
    BAND: ("q", "key", "value", "place"),
}
#: attributes of a node beside scale and softcap, whole numbers
WHOLE = {BAND: ("sinks", "window")}
_BODIES = {
    "MaskedAttention": "MASKED\n  y = Identity (masked_y)\n}",
    "RegionAttention": _REGIONS + _END,
    "ChosenRegionAttention": _CHOSEN + _END,
    BAND: BAND_BODY,
}


def encoder_body(name: str, capped: bool = True) -> str:
    """The body of a node of `ENCODER` without the domain's line.

    Args:
        name: of the node.
        capped: some node may have a softcap.
    """
    start = _START.replace("NAME", name).replace("INPUTS", ", ".join(ENCODER[name]))
    start = start.replace("MORE", "".join(f", {x}: int" for x in WHOLE.get(name, ())))
    body = _BODIES[name].replace("MASKED", masked())
    return finished(start + body, capped)
