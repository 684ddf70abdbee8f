"""The body of `KeptAttention` in ONNX's textual syntax: a state of what a later query may see.

For patterns that are KV-monotone. What a key's own position makes visible (sinks, columns, strides)
is visible for good and stands in the first state, in the order of positions; token t of the batch,
padding counted, stands in a ring of W rows at t mod W. W is what the state has: at least the widest
window of the texts that fit, for elastic windows grow. A token that is kept counts there alone. The
first state has a row more than is ever kept: behind the last one, where every token is written that
may not be.

One token attends to both states as they are, under a mask: nothing is copied. Several attend to
[kept | ring | new] by regions (`pattern_regions.py`), and both states are gathered from those rows.

`kv_len` is the same for every row of a batch, as wherever padding stands on the left.
"""

from __future__ import annotations

from collections.abc import Collection

from reattend.targets.onnx.fragments import finished
from reattend.targets.onnx.pattern_regions import (
    POSITIONS,
    QUERIES,
    by_region,
    filled,
    renamed,
    union,
)
from reattend.targets.onnx.pattern_terms import TERMS
from reattend.targets.onnx.ring_rows import NEXT, PLACES

KEPT = "KeptAttention"
#: terms that depend on the key alone, and all that the node knows
BY_KEY = ("sinks", "stride", "columns")
KNOWN = (*BY_KEY, "window", "window_slope")

_KEPT = """KeptAttention
<scale: float, sliding_window: int = 0, softcap: float = 0.0, sinks: int = 0, window: int = 0,
 window_slope: tensor, stride: ints, columns: ints>
(q, key, value, past_ring_key, past_ring_value, past_key, past_value, kv_start, kv_len)
  => (y, ring_key, ring_value, kept_key, kept_value)
{
SIZES
POSITIONS
ONCE
  axes_12 = Constant <value_ints = [1, 2]> ()
  total = Gather (lengths, zero)
  newest = Sub (total, p1)
  w_1 = Shape <start = 2, end = 3> (past_ring_key)
  w_int = Squeeze (w_1, axis_0)
  w = Cast <to = 6> (w_int)
  k_1 = Shape <start = 2, end = 3> (past_key)
  k_int = Squeeze (k_1, axis_0)
  k = Cast <to = 6> (k_int)
  slot = Range (p0, w, p1)
  kept_slot = Range (p0, k, p1)
  turn = Mod (newest, w)
  turned = Sub (turn, slot)
  behind = Mod (turned, w)
  j_k = Range (p0, total, p1)
BY_KEY
  is_kept = Identity (BY_KEY_UNION)
  last_b = Sub (newest, start)
  i_last = Max (last_b, p0)
  is_step = Equal (n, one)
  y, ring_key, ring_value, kept_key, kept_value = If (is_step) <
    then_branch = step () => (step_y, step_ring_key, step_ring_value, step_key, step_value)
    {
STEP
    },
    else_branch = several ()
      => (regions_y, next_ring_key, next_ring_value, next_kept_key, next_kept_value)
    {
SEVERAL
    }
  >
}"""

# the newest token of every text, under a mask [B, K + W]
_STEP = """
      i = Unsqueeze (i_last, axis_1)
      is_upto = LessOrEqual (j_k, i)
      kept_upto = And (is_upto, is_kept)
      kept_ones = Cast <to = 6> (kept_upto)
      count = ReduceSum (kept_ones, axis_1)
      count_b = Squeeze (count, axis_1)
      itself_kept = Gather (is_kept, i_last)
      itself_b = Cast <to = 6> (itself_kept)
      next_b = Sub (count_b, itself_b)
      kept_at = Cast <to = 7> (next_b)
      turn_int = Cast <to = 7> (turn)
      texts_1 = Shape (start)
      ring_at = Expand (turn_int, texts_1)
      step_key = TensorScatter <axis = 2> (past_key, key, kept_at)
      step_value = TensorScatter <axis = 2> (past_value, value, kept_at)
      step_ring_key = TensorScatter <axis = 2> (past_ring_key, key, ring_at)
      step_ring_value = TensorScatter <axis = 2> (past_ring_value, value, ring_at)
      is_kept_slot = Less (kept_slot, count)
      apart = Identity (behind)
      j = Sub (i, apart)
      j_any = Max (j, p0)
      ring_is_kept = Gather (is_kept, j_any)
      ring_only = Not (ring_is_kept)
      is_real = GreaterOrEqual (j, p0)
WINDOW
      real_wide = And (is_real, WIDE)
      ring_any = And (real_wide, ring_only)
NEAR
      both_seen = Concat <axis = 1> (kept_seen, ring_seen)
      visible = Unsqueeze (both_seen, axes_12)
      by_group = Concat <axis = 0> (same, g, others, same)
      q_scaled = Mul (q, factor)
      q_rows = Reshape (q_scaled, by_group)
      kept_key_t = Transpose <perm = [0, 1, 3, 2]> (step_key)
      ring_key_t = Transpose <perm = [0, 1, 3, 2]> (step_ring_key)
      kept_scores = MatMul (q_rows, kept_key_t)
      ring_scores = MatMul (q_rows, ring_key_t)
      scores_any = Concat <axis = 3> (kept_scores, ring_scores)
BIAS
BY_BIAS
      parts = Concat <axis = 0> (k_1, w_1)
      kept_weights, ring_weights = Split <axis = 3> (weights, parts)
      kept_y = MatMul (kept_weights, step_value)
      ring_y = MatMul (ring_weights, step_ring_value)
      y_rows = Add (kept_y, ring_y)
      as_step_y = Constant <value_ints = [0, -1, 1, 0]> ()
      step_y = Reshape (y_rows, as_step_y)"""

_NEAR = {
    True: """
      beyond = Sub (i, reach)
      is_beyond = LessOrEqual (j_k, beyond)
      kept_beyond = And (is_beyond, is_kept)
      beyond_ones = Cast <to = 6> (kept_beyond)
      first_near = ReduceSum (beyond_ones, axis_1)
      is_near_slot = GreaterOrEqual (kept_slot, first_near)
      kept_seen = And (is_kept_slot, is_near_slot)
      is_near_row = Less (apart, reach)
      ring_seen = And (ring_any, is_near_row)""",
    False: """
      kept_seen = Identity (is_kept_slot)
      ring_seen = Identity (ring_any)""",
}

_SEVERAL = f"""{QUERIES}{PLACES}
      rows_key = Concat <axis = 2> (past_key, past_ring_key, key)
      rows_value = Concat <axis = 2> (past_value, past_ring_value, value)
      place_any = Compress <axis = 0> (j_k, is_kept)
      kept_many = Shape (place_any)
      spare_any = Sub (k_1, kept_many)
      spare = Max (spare_any, same)
      no_place = Expand (nowhere, spare)
      kept_place = Concat <axis = 0> (place_any, no_place)
      kept_time = Add (kept_place, start_b1)
      is_before = Less (kept_time, past)
      is_place = GreaterOrEqual (kept_place, p0)
      is_held = And (is_before, is_place)
      kept_j = Where (is_held, kept_place, nowhere)
      ring_place_any = Max (ring_place, p0)
      ring_is_kept = Gather (is_kept, ring_place_any)
      ring_j = Where (ring_is_kept, nowhere, ring_place)
      j_rows = Concat <axis = 1> (kept_j, ring_j, new_j)
{by_region("rows_key", "rows_value")}{NEXT}"""


def kept_body(terms: Collection[str] = KNOWN, capped: bool = True, sliding: bool = True) -> str:
    """`KeptAttention` without the domain's line.

    Args:
        terms: those of `TERMS` that some node has; others than `KNOWN` are nothing to it.
        capped: some node may have a softcap.
        sliding: the block of some node may have a window of its own.
    """
    shown = {"sinks", *terms} & {*KNOWN}
    by_key, key_union = union(
        {n: renamed(TERMS[n].seen, "_k") for n in TERMS if n in shown and n in BY_KEY}, "_k"
    )
    window = "window_slope" if "window_slope" in shown else "window"
    step = _STEP.replace("\nWINDOW", TERMS[window].seen).replace("WIDE", window)
    body = _KEPT.replace("\nSTEP", step.replace("\nNEAR", _NEAR[sliding]))
    body = body.replace("\nBY_KEY\n", f"{by_key}\n").replace("BY_KEY_UNION", key_union)
    body = body.replace("\nSEVERAL", _SEVERAL).replace("\nPOSITIONS", POSITIONS)
    return finished(filled(body, shown, sliding), capped)
