"""Regions of queries that read rows listed for each, in ONNX's textual syntax.

A region of one head gathers its rows, but for those that none of its queries sees, and meets them
under a mask of its own: mask, rows and scores stay in a processor's cache from the first product to
the second. Letters: B rows, G KV heads, X = G or H heads that choose, R regions of c queries each,
T = R X / G, J query heads of a region, K rows that it lists, d and e widths.
"""

from __future__ import annotations

import re

from reattend.targets.onnx.fragments import ROWS_OF_HEAD

# scanned by KV head [B G, ...], and inside by region [T, ...]
_REGIONS = """
      region_many = Shape <start = 1, end = 2> (regions_q)
      list_1 = Shape <start = 3, end = 4> (rows_listed)
      as_listed = Concat <axis = 0> (others, region_many, list_1)
      never_short = Constant <value: tensor = int32 {2147483647}> ()
      never_any = Cast <to = 7> (never_short)
      begin_any = Min (rows_begin, never_any)
      end_any = Min (rows_end, never_any)
      held_b = Sub (lengths, start)
      held_last_b = Sub (held_b, one)
      axes_after = Constant <value_ints = [1, 2, 3]> ()
      held_last = Unsqueeze (held_last_b, axes_after)
      row_held = Min (rows_listed, held_last)
      row_in = Max (row_held, zero)
      row_32 = Cast <to = 6> (row_in)
      begin_32 = Cast <to = 6> (begin_any)
      end_32 = Cast <to = 6> (end_any)
      row_regions = Reshape (row_32, as_listed)
      begin_regions = Reshape (begin_32, as_listed)
      end_regions = Reshape (end_32, as_listed)
      choosers_1 = Shape <start = 1, end = 2> (rows_listed)
      one_each = Constant <value_ints = [1, 1, 1]> ()
      by_chooser = Concat <axis = 0> (one_1, choosers_1, one_each)
      region_sizes = Shape <start = 3, end = 4> (regions_q)
      as_places = Concat <axis = 0> (others, region_many, region_sizes, one_1)BOUND_REGIONS
      place_32 = Cast <to = 6> (places)
      place_each = Expand (place_32, by_chooser)
      place_regions = Reshape (place_each, as_places)
      as_keys = Shape <start = 2> (present_key)
      as_values = Shape <start = 2> (present_value)
      as_key_heads = Concat <axis = 0> (others, as_keys)
      as_value_heads = Concat <axis = 0> (others, as_values)
      key_heads = Reshape (present_key, as_key_heads)
      value_heads = Reshape (present_value, as_value_heads)
      q_width = Shape <start = 4, end = 5> (regions_q)
      value_last = Shape <start = 3, end = 4> (value)
      q_flat = Concat <axis = 0> (others, q_width)
      as_y_head = Concat <axis = 0> (others, region_sizes, value_last)
      regions_scaled = Mul (regions_q, factor)
      list_many = Squeeze (list_1, axis_0)
      place_in_list = Range (zero, list_many, one)
      is_first_listed = Equal (place_in_list, zero)
      regions_y = Scan <
        body = of_head (
          own_q, own_rows, own_begin, own_end, own_places, head_key, head_valueOWN_BOUNDS
        ) => (own_y)
        {
          own_y = Scan <
            body = of_region (
              head_q, row_listed, begin_listed, end_listed, own_placeOWN_BOUND
            ) => (head_y)
            {
              last_own = ReduceMax <keepdims = 0> (own_place)
              first_own = ReduceMin <keepdims = 0> (own_place)
              is_begun = LessOrEqual (begin_listed, last_own)
              is_not_over = Less (first_own, end_listed)
              is_between = And (is_begun, is_not_over)WANTED
              is_read = Or (is_wanted, is_first_listed)
              rows = Compress <axis = 0> (row_listed, is_read)
              begins = Compress <axis = 0> (begin_listed, is_read)
              ends = Compress <axis = 0> (end_listed, is_read)
              is_past = LessOrEqual (begins, own_place)
              is_near = Less (own_place, ends)
              is_seen = And (is_past, is_near)VISIBLE
MANY_BIAS
              by_rows = Shape (visible)
              rows_many = Shape (rows)
              as_scores = Concat <axis = 0> (others, by_rows)
              as_weights = Concat <axis = 0> (others, rows_many)ROWS_OF_HEAD
            },
            num_scan_inputs = INSIDE
          > (own_q, own_rows, own_begin, own_end, own_placesOWN_BOUNDS)
        },
        num_scan_inputs = OUTSIDE
      > (
        regions_scaled, row_regions, begin_regions, end_regions, place_regions, key_heads,
        value_headsBY_BOUND
      )"""

_WITHOUT = {
    "BOUND_REGIONS": "",
    "OWN_BOUNDS": "",
    "OWN_BOUND": "",
    "BY_BOUND": "",
    "WANTED": """
              is_wanted = Identity (is_between)""",
    "VISIBLE": """
              visible = Identity (is_seen)""",
    "INSIDE": "5",
    "OUTSIDE": "7",
}
_WITH = {
    "BOUND_REGIONS": """
      bound_32 = Cast <to = 6> (bound)
      bound_each = Expand (bound_32, by_chooser)
      bound_regions = Reshape (bound_each, as_places)
      standing_32 = Cast <to = 6> (rows_at)""",
    "OWN_BOUNDS": ", own_bounds",
    "OWN_BOUND": ", own_bound",
    "BY_BOUND": ", bound_regions",
    "WANTED": """
              last_bound = ReduceMax <keepdims = 0> (own_bound)
              is_in_bound = Less (standing_32, last_bound)
              is_wanted = And (is_between, is_in_bound)""",
    "VISIBLE": """
              standing_read = Compress <axis = 0> (standing_32, is_read)
              is_chosen = Less (standing_read, own_bound)
              visible = And (is_seen, is_chosen)""",
    "INSIDE": "6",
    "OUTSIDE": "8",
}


def listed_regions(bounded: bool) -> str:
    """Lines that make `regions_y` [B G, T, J, c, e] of regions that read rows listed for them.

    `regions_q` [B G, T, J, c, d] at `places` [B, 1, R, c, 1] read of the states the rows
    `rows_listed` [B, X, R, K], each seen by the queries from `rows_begin` to before `rows_end`. The
    first one listed is read, whether seen or not.

    Args:
        bounded: and seen only where it stands, at `rows_at` [K], before the query's `bound`
            [B, X or 1, R, c, 1].
    """
    text = _REGIONS
    for word, lines in (_WITH if bounded else _WITHOUT).items():
        text = re.sub(rf"(?<![A-Z_]){word}(?![A-Z_])", lines, text)
    return text.replace("ROWS_OF_HEAD", ROWS_OF_HEAD)
