"""The bodies of nodes of models without states, in ONNX's textual syntax.

Which keys are read is said by inputs: what a pattern shows, or what was chosen before in the graph.
`MaskedAttention` forms every score. The others read, for every region of queries, listed rows:
`RegionAttention` the same ones in all heads and texts, `ChosenRegionAttention` rows of each head's
own. Letters: B batch, H query heads, G key/value heads, J = H / G, N queries, M keys, R regions, c
queries and K keys of a region, d and e widths.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import finished, read_rows

_START = """NAME <scale: float, softcap: float>
(INPUTS) => (y)
{
SIZES
"""

_MASKED = """
  by_group = Concat <axis = 0> (same, g, others, same)
  q_rows = Reshape (q, by_group)
  q_scaled = Mul (q_rows, factor)
  key_t = Transpose <perm = [0, 1, 3, 2]> (key)
  score_rows = MatMul (q_scaled, key_t)
  by_head = Concat <axis = 0> (same, others, n_1, same)
  scores_any = Reshape (score_rows, by_head)
  visible = Identity (seen)
SOFTMAX
  weight_rows = Reshape (weights, by_group)
  y_rows = MatMul (weight_rows, value)
  y = Reshape (y_rows, by_head)
}"""

_REGION_SIZES = """
  r_1 = Shape <start = 0, end = 1> (query_rows)
  c_1 = Shape <start = 1, end = 2> (query_rows)
  d_1 = Shape <start = 3, end = 4> (q)
  e_1 = Shape <start = 3, end = 4> (value)
  h_1 = Shape <start = 1, end = 2> (q)
  q_regions = Gather <axis = 2> (q, query_rows)
  q_scaled = Mul (q_regions, factor)"""

# heads of a group are rows of one product
_REGIONS = """
  k_1 = Shape <start = 1, end = 2> (key_rows)
  j_1 = Div (h_1, g)
  by_head = Concat <axis = 0> (same, g, others, r_1, c_1, d_1)
  q_split = Reshape (q_scaled, by_head)
  q_beside = Transpose <perm = [0, 1, 3, 2, 4, 5]> (q_split)
  as_rows = Concat <axis = 0> (same, same, same, others, d_1)
  q_rows = Reshape (q_beside, as_rows)
  key_read = Gather <axis = 2> (key, key_rows)
  value_read = Gather <axis = 2> (value, key_rows)
  key_t = Transpose <perm = [0, 1, 2, 4, 3]> (key_read)
  score_rows = MatMul (q_rows, key_t)
  by_score = Concat <axis = 0> (same, same, same, j_1, c_1, k_1)
  scores_any = Reshape (score_rows, by_score)
  visible = Unsqueeze (seen, axis_1)
SOFTMAX
  as_weights = Concat <axis = 0> (same, same, same, others, k_1)
  weight_rows = Reshape (weights, as_weights)
  y_rows = MatMul (weight_rows, value_read)
  by_region = Concat <axis = 0> (same, same, same, j_1, c_1, e_1)
  y_split = Reshape (y_rows, by_region)
  y_apart = Transpose <perm = [0, 1, 3, 2, 4, 5]> (y_split)
  flat = Concat <axis = 0> (same, h_1, others, e_1)
  y_flat = Reshape (y_apart, flat)
  y = Gather <axis = 2> (y_flat, at)
}"""

_CHOSEN = f"""
  rows_in = Identity (key_rows){read_rows("key", "value")}
  scores_any = MatMul (q_scaled, key_t)
  visible = Identity (seen)
SOFTMAX
  y_regions = MatMul (weights, read_value)
  flat = Concat <axis = 0> (same, same, others, e_1)
  y_flat = Reshape (y_regions, flat)
  y = Gather <axis = 2> (y_flat, at)
}}"""

_REGION_INPUTS = ("q", "key", "value", "query_rows", "key_rows", "seen", "at")
#: inputs of each node
ENCODER = {
    "MaskedAttention": ("q", "key", "value", "seen"),
    "RegionAttention": _REGION_INPUTS,
    "ChosenRegionAttention": _REGION_INPUTS,
}
_BODIES = {
    "MaskedAttention": _MASKED,
    "RegionAttention": _REGION_SIZES + _REGIONS,
    "ChosenRegionAttention": _REGION_SIZES + _CHOSEN,
}


def encoder_body(name: str, capped: bool = True) -> str:
    """The body of a node of `ENCODER` without the domain's line.

    Args:
        name: of the node.
        capped: some node may have a softcap.
    """
    start = _START.replace("NAME", name).replace("INPUTS", ", ".join(ENCODER[name]))
    return finished(start + _BODIES[name], capped)
