"""Several tokens that choose each for itself, tile by tile, in ONNX's textual syntax.

A tile of queries of one head gathers the rows that one of them reads, and meets those under a mask:
mask, rows and scores stay in a processor's cache from the first product to the second. Letters: B
rows, H query heads, G KV heads, J query heads of each, N new tokens, M rows of keys, K of them that
a tile reads, R tiles of c queries, d and e widths.
"""

from __future__ import annotations

from collections.abc import Mapping

from reattend.targets.onnx.fragments import RUNS, meeting

# scanned by KV head [B G, ...], and inside by tile [J R, c, ...]
_BEFORE = f"""
      run_most = Constant <value_int = @TILE> (){RUNS}
      rows_all = Shape <start = 0, end = 1> (q)
      heads_all = Shape <start = 1, end = 2> (q)
      heads_each = Div (heads_all, g)
      tiles_each = Mul (heads_each, runs_1)
      by_query_head = Concat <axis = 0> (one_1, heads_all, one_1, one_1)
      place_short = Cast <to = 6> (place)
      place_heads = Expand (place_short, by_query_head)
      q_width = Shape <start = 3, end = 4> (q)
      as_q_tiles = Concat <axis = 0> (others, tiles_each, run_c_1, q_width)
      q_tiles = Reshape (q_regions, as_q_tiles)
      key_row = Cast <to = 6> (key_number)"""
#: all rows so far, in their order
ALL_ROWS = """
      total = Gather (lengths, zero)
      total_1 = Unsqueeze (total, axis_0)
      key_number = Range (zero, total, one)
      used_key = Slice (present_key, same, total_1, axis_2)
      used_value = Slice (present_value, same, total_1, axis_2)"""
_BY_QUERY = """
      NAME_run = Gather <axis = 2> (VALUE, run_at)
      NAME_width = Shape <start = 3, end = 4> (VALUE)
      as_NAME_tiles = Concat <axis = 0> (others, tiles_each, run_c_1, NAME_width)
      NAME_tiles = Reshape (NAME_run, as_NAME_tiles)"""
_BY_KEY = """
      NAME_shape = Shape <start = 2> (VALUE)
      as_NAME_heads = Concat <axis = 0> (others, NAME_shape)
      NAME_heads = Reshape (VALUE, as_NAME_heads)"""
_TILES = """
      tiles_y = Scan <
        body = of_head (BY_QUERY_head, BY_KEY_all) => (head_y)
        {ONCE
          head_y = Scan <
            body = of_tile (BY_QUERY_tile) => (tile_y)
            {
              last_place = ReduceMax <keepdims = 0> (place_tile)READS
              rows_1 = NonZero (is_read)
              rows = Squeeze (rows_1, axis_0)
              row_read = Gather (key_row, rows)
              key_read = Gather (key_all, rows)
              value_read = Gather (value_all, rows)SEEN
              q_scaled = Mul (q_tile, factor)MEETING
            },
            num_scan_inputs = QUERY_INPUTS
          > (BY_QUERY_head)
        },
        num_scan_inputs = ALL_INPUTS
      > (BY_QUERY_tiles, BY_KEY_heads)
      value_last = Shape <start = 3, end = 4> (value)
      as_y = Concat <axis = 0> (rows_all, heads_all, others, value_last)
      y_runs = Reshape (tiles_y, as_y)
      several_y = Slice (y_runs, same, n_1, axis_2)"""


def tiled(
    by_query: Mapping[str, str],
    by_key: Mapping[str, str],
    reads: str,
    seen: str,
    once: str = "",
) -> str:
    """Lines for many tokens that choose from `used_key` and `used_value` [B, G, M, d or e].

    These are the tokens `key_number` [M].

    Args:
        by_query: under NAME, of which a tile has NAME_tile [c, f], values [B, H, N, f].
        by_key: under NAME, of which a head has NAME_all [M, ...], values [B, G, M, ...].
        reads: lines that make `is_read` [M] of a tile from these, from place_tile [c, 1], from
            its `last_place`, and from key_row [M], all in 32 bits.
        seen: lines that make `visible` [c, K] from row_read [K], and whatever else at `rows` [K].
        once: lines for a head, before its tiles.
    """
    queries = {"place": "place_heads", **by_query}
    keys = {"key": "used_key", "value": "used_value", **by_key}
    lines = _BEFORE
    for text, values in ((_BY_QUERY, queries), (_BY_KEY, keys)):
        for name, value in values.items():
            lines += text.replace("NAME", name).replace("VALUE", value)
    scanned = ["q", *queries]
    scans = _TILES.replace("QUERY_INPUTS", str(len(scanned)))
    scans = scans.replace("ALL_INPUTS", str(len(scanned) + len(keys)))
    for word, names in (("BY_QUERY", scanned), ("BY_KEY", list(keys))):
        for end in ("heads", "head", "tiles", "tile", "all"):
            scans = scans.replace(f"{word}_{end}", ", ".join(f"{name}_{end}" for name in names))
    scans = scans.replace("MEETING", meeting("q_scaled", "key_read", "value_read", "tile_y"))
    return lines + scans.replace("READS", reads).replace("SEEN", seen).replace("ONCE", once)
