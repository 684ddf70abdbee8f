"""The body of `SparseAttention` in ONNX's textual syntax: sinks and a window, standard operators.

Its state is of bounded size: rows 0..sinks-1 hold the first tokens of each sequence, the `window`
rows behind them are a ring, in which token t of the batch (padding counted, so that all rows of the
batch agree) stands at t mod window. One new token is written first and then attends to the whole
state, of which nothing is copied. Several attend to [sinks | ring | new] by regions
(`pattern_regions.py`): N (sinks + window) products and not N^2, however long the text is, and the
scores of one region of one head at a time. A sink inside the window counts once, as sink.

What a state receives is computed from a copy (`rows_key`, `rows_value`) of all that is read of it:
both may be one buffer, and a runtime knows only what depends on what.

Positions count from the first real token; a row of padding gets finite numbers that mean nothing.
`kv_len` is the same for every row of a batch, as wherever padding stands on the left.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import finished, one_token
from reattend.targets.onnx.pattern_regions import POSITIONS, QUERIES, by_region, filled
from reattend.targets.onnx.ring_rows import NEXT, PLACES

_SPARSE = """SparseAttention
<scale: float, window: int, sinks: int = 0, sliding_window: int = 0, softcap: float = 0.0>
(q, key, value, past_key, past_value, kv_start, kv_len) => (y, present_key, present_value)
{
SIZES
POSITIONS
ONCE
  axes_12 = Constant <value_ints = [1, 2]> ()
  total = Gather (lengths, zero)
  newest = Sub (total, p1)
  k = Identity (sinks_p)
  w = Identity (width)
  kept_slot = Range (p0, k, p1)
  slot = Range (p0, w, p1)
  turn = Mod (newest, w)
  turned = Sub (turn, slot)
  behind = Mod (turned, w)
  is_step = Equal (n, one)
  y, present_key, present_value = If (is_step) <
    then_branch = step () => (step_y, step_key, step_value)
    {
STEP
    },
    else_branch = several () => (regions_y, several_key, several_value)
    {
SEVERAL
    }
  >
}"""

_STEP = f"""
      place_b = Sub (newest, start)
      to_sinks = Less (place_b, k)
      at_sink = Max (place_b, p0)
      at_ring = Add (k, turn)
      at_any = Where (to_sinks, at_sink, at_ring)
      at = Cast <to = 7> (at_any)
      step_key = TensorScatter <axis = 2> (past_key, key, at)
      step_value = TensorScatter <axis = 2> (past_value, value, at)
      i = Unsqueeze (place_b, axis_1)
      ring_place = Sub (i, behind)
      in_ring = GreaterOrEqual (ring_place, k)
      in_sinks = LessOrEqual (kept_slot, i)
NEAR
      seen = Concat <axis = 1> (sink_seen, in_ring)
      visible = Unsqueeze (seen, axes_12)
{one_token("step_key", "step_value")[1:]}"""

# how far away a sink is
_NEAR = {
    True: """
      ago = Sub (i, kept_slot)
      is_near = Less (ago, reach)
      sink_seen = And (in_sinks, is_near)""",
    False: """
      sink_seen = Identity (in_sinks)""",
}

# sinks are the rows that are kept
_SEVERAL = f"""{QUERIES}{PLACES}
      rows_key = Concat <axis = 2> (past_key, key)
      rows_value = Concat <axis = 2> (past_value, value)
      kept_time = Add (start_b1, kept_slot)
      is_before = Less (kept_time, past)
      is_place = GreaterOrEqual (kept_slot, p0)
      sink_j = Where (is_before, kept_slot, nowhere)
      is_no_sink = GreaterOrEqual (ring_place, k)
      ring_j = Where (is_no_sink, ring_place, nowhere)
      j_rows = Concat <axis = 1> (sink_j, ring_j, new_j)
{by_region("rows_key", "rows_value")}{NEXT}
      several_key = Concat <axis = 2> (next_kept_key, next_ring_key)
      several_value = Concat <axis = 2> (next_kept_value, next_ring_value)"""


def sparse_body(capped: bool = True, sliding: bool = True) -> str:
    """`SparseAttention` without the domain's line.

    Args:
        capped: some node may have a softcap.
        sliding: the block of some node may have a window of its own.
    """
    body = _SPARSE.replace("\nSTEP", _STEP.replace("\nNEAR", _NEAR[sliding]))
    body = body.replace("\nSEVERAL", _SEVERAL).replace("\nPOSITIONS", POSITIONS)
    return finished(filled(body, ("sinks", "window"), sliding), capped)
