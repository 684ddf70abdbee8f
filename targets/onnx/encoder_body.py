"""The bodies of nodes of models without states, in ONNX's textual syntax.

Which keys are read is said by inputs: what a pattern shows, or what was chosen before in the graph.
`MaskedAttention` forms every score. The others read, for every region of queries, listed rows:
`RegionAttention` the same ones in all heads and texts, `ChosenRegionAttention` rows of each head's
own, and `BandAttention` (`encoder_band.py`) those near in the text. Letters: B batch, H query
heads, G key/value heads, J = H / G, N queries, M keys, R regions, c queries and K keys of a region,
d and e widths.
"""

from __future__ import annotations

from reattend.targets.onnx.encoder_band import BAND, BAND_BODY
from reattend.targets.onnx.fragments import every_score, finished, read_rows

_START = """NAME <scale: float, softcap: floatMORE>
(INPUTS) => (y)
{
SIZES
"""

_SEEN = """
  visible = Identity (seen)
MASKED
  y = Identity (masked_y)
}"""

_QUERIES = """
  q_regions = Gather <axis = 2> (q, query_rows)"""

_REGIONS = """
  read_key = Gather <axis = 2> (key, key_rows)
  read_value = Gather <axis = 2> (value, key_rows)
  visible = Unsqueeze (seen, axis_1)
REGIONS
  y = Gather <axis = 2> (y_flat, at)
}"""

_CHOSEN = f"""
  q_scaled = Mul (q_regions, factor)
  rows_in = Identity (key_rows){read_rows("key", "value")}
  key_t = Transpose <perm = [0, 1, 2, 4, 3]> (read_key)
  scores_any = MatMul (q_scaled, key_t)
  visible = Identity (seen)
MANY_WEIGHTS
  y_regions = MatMul (weights, read_value)
  flat = Concat <axis = 0> (same, same, others, value_width)
  y_flat = Reshape (y_regions, flat)
  y = Gather <axis = 2> (y_flat, at)
}}"""

_REGION_INPUTS = ("q", "key", "value", "query_rows", "key_rows", "seen", "at")
#: inputs of each node
ENCODER = {
    "MaskedAttention": ("q", "key", "value", "seen"),
    "RegionAttention": _REGION_INPUTS,
    "ChosenRegionAttention": _REGION_INPUTS,
    BAND: ("q", "key", "value", "place"),
}
#: attributes of a node beside scale and softcap, whole numbers
WHOLE = {BAND: ("sinks", "window")}
_BODIES = {
    "MaskedAttention": _SEEN,
    "RegionAttention": _QUERIES + _REGIONS,
    "ChosenRegionAttention": _QUERIES + _CHOSEN,
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
    body = _BODIES[name].replace("\nMASKED", every_score("key", "value", "masked_y"))
    return finished(start + body, capped)
