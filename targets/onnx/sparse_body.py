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
  turn = Mod (newest, width)
  sink = Range (p0, sinks_p, p1)
  ring_slot = Range (p0, width, p1)
  turned = Sub (turn, ring_slot)
  behind = Mod (turned, width)
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
      to_sinks = Less (place_b, sinks_p)
      at_sink = Max (place_b, p0)
      at_ring = Add (sinks_p, turn)
      at_any = Where (to_sinks, at_sink, at_ring)
      at = Cast <to = 7> (at_any)
      step_key = TensorScatter <axis = 2> (past_key, key, at)
      step_value = TensorScatter <axis = 2> (past_value, value, at)
      i = Unsqueeze (place_b, axis_1)
      ring_place = Sub (i, behind)
      in_ring = GreaterOrEqual (ring_place, sinks_p)
      in_sinks = LessOrEqual (sink, i)
NEAR
      seen = Concat <axis = 1> (sink_seen, in_ring)
      visible = Unsqueeze (seen, axes_12)
{one_token("step_key", "step_value")[1:]}"""

# how far away a sink is
_NEAR = {
    True: """
      ago = Sub (i, sink)
      is_near = Less (ago, reach)
      sink_seen = And (in_sinks, is_near)""",
    False: """
      sink_seen = Identity (in_sinks)""",
}

# rows: [sinks | ring | new]. What stands where follows from how many tokens there were.
_SEVERAL = f"""{QUERIES}
      past = Sub (total, n_p)
      rows_key = Concat <axis = 2> (past_key, key)
      rows_value = Concat <axis = 2> (past_value, value)
      nowhere = Constant <value: tensor = int32 {{-1073741824}}> ()
      sink_time = Add (start_b1, sink)
      is_before = Less (sink_time, past)
      sink_j = Where (is_before, sink, nowhere)
      past_last = Sub (past, p1)
      ring_turned = Sub (past_last, ring_slot)
      ring_behind = Mod (ring_turned, width)
      ring_time = Sub (past_last, ring_behind)
      ring_place = Sub (ring_time, start_b1)
      is_no_sink = GreaterOrEqual (ring_place, sinks_p)
      ring_j = Where (is_no_sink, ring_place, nowhere)
      new_time = Range (past, total, p1)
      new_j = Sub (new_time, start_b1)
      j_rows = Concat <axis = 1> (sink_j, ring_j, new_j)
{by_region("rows_key", "rows_value")}
      ring_next = Sub (newest, behind)
      ring_is_new = GreaterOrEqual (ring_next, past)
      size = Add (sinks_p, width)
      new_row_0 = Sub (size, past)
      ring_new_row = Add (ring_next, new_row_0)
      ring_old_row = Add (ring_slot, sinks_p)
      ring_row = Where (ring_is_new, ring_new_row, ring_old_row)
      next_ring_key = Gather <axis = 2> (rows_key, ring_row)
      next_ring_value = Gather <axis = 2> (rows_value, ring_row)
      is_not_later = Less (sink_time, total)
      is_since = Not (is_before)
      sink_is_new = And (is_not_later, is_since)
      sink_new_row = Add (sink_time, new_row_0)
      sink_row = Where (sink_is_new, sink_new_row, sink)
      sink_row_int = Cast <to = 7> (sink_row)
      axes_13 = Constant <value_ints = [1, 3]> ()
      sink_index_b = Unsqueeze (sink_row_int, axes_13)
      texts_heads = Shape <start = 0, end = 2> (key)
      one_1d = Constant <value_ints = [1]> ()
      sinks_1 = Shape (sink)
      as_index = Concat <axis = 0> (texts_heads, sinks_1, one_1d)
      sink_index = Expand (sink_index_b, as_index)
      next_sink_key = GatherND <batch_dims = 2> (rows_key, sink_index)
      next_sink_value = GatherND <batch_dims = 2> (rows_value, sink_index)
      several_key = Concat <axis = 2> (next_sink_key, next_ring_key)
      several_value = Concat <axis = 2> (next_sink_value, next_ring_value)"""


def sparse_body(capped: bool = True, sliding: bool = True) -> str:
    """`SparseAttention` without the domain's line.

    Args:
        capped: some node may have a softcap.
        sliding: the block of some node may have a window of its own.
    """
    body = _SPARSE.replace("\nSTEP", _STEP.replace("\nNEAR", _NEAR[sliding]))
    body = body.replace("\nSEVERAL", _SEVERAL).replace("\nPOSITIONS", POSITIONS)
    return finished(filled(body, ("sinks", "window"), sliding), capped)
