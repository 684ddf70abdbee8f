"""Several tokens under a mask, tile by tile, in ONNX's textual syntax.

Where neighbours together read most of the text, no rows are gathered for them: they meet every key
under a mask. A tile of queries of one head at a time does, so its mask and its scores stay in a
processor's cache from the first product to the second. Letters: B rows, H query heads, G KV heads,
J query heads of each, N new tokens, M tokens so far, R tiles of c queries, d and e widths.
"""

from __future__ import annotations

from collections.abc import Mapping

from reattend.targets.onnx.fragments import RUNS

# scanned by KV head [B G, ...], and inside by tile [J R, c, ...]
_BEFORE = f"""
      run_most = Constant <value_int = @TILE> (){RUNS}
      total = Gather (lengths, zero)
      total_1 = Unsqueeze (total, axis_0)
      used_key = Slice (present_key, same, total_1, axis_2)
      used_value = Slice (present_value, same, total_1, axis_2)
      rows_all = Shape <start = 0, end = 1> (q)
      heads_all = Shape <start = 1, end = 2> (q)
      heads_each = Div (heads_all, g)
      tiles_each = Mul (heads_each, runs_1)
      place_run = Gather <axis = 1> (place_bn, run_at)
      place_short = Cast <to = 6> (place_run)
      as_place = Concat <axis = 0> (same, one_1, one_1, runs_1, run_c_1)
      place_5 = Reshape (place_short, as_place)
      by_head = Concat <axis = 0> (one_1, g, heads_each, one_1, one_1)
      place_heads = Expand (place_5, by_head)
      as_place_tiles = Concat <axis = 0> (others, tiles_each, one_1, run_c_1)
      places = Reshape (place_heads, as_place_tiles)
      q_width = Shape <start = 3, end = 4> (q)
      as_q_tiles = Concat <axis = 0> (others, tiles_each, run_c_1, q_width)
      q_tiles = Reshape (q_regions, as_q_tiles)
      key_number = Range (zero, total, one)
      key_short = Cast <to = 6> (key_number)
      key_column = Unsqueeze (key_short, axis_1)"""
_BY_QUERY = """
      NAME_run = Gather <axis = 2> (VALUE, run_at)
      NAME_width = Shape <start = 3, end = 4> (VALUE)
      as_NAME_tiles = Concat <axis = 0> (others, tiles_each, run_c_1, NAME_width)
      NAME_tiles = Reshape (NAME_run, as_NAME_tiles)"""
_BY_KEY = """
      NAME_width = Shape <start = 2> (VALUE)
      as_NAME_heads = Concat <axis = 0> (others, NAME_width)
      NAME_heads = Reshape (VALUE, as_NAME_heads)"""
_TILES = """
      tiles_y = Scan <
        body = of_head (place_head, BY_QUERY_head, BY_KEY_all) => (head_y)
        {
          key_t = Transpose <perm = [1, 0]> (key_all)
          head_y = Scan <
            body = of_tile (place_tile, BY_QUERY_tile) => (tile_y)
            {SEEN
              q_scaled = Mul (q_tile, factor)
              scores_any = MatMul (q_scaled, key_t)
MANY_WEIGHTS
              tile_y = MatMul (weights, value_all)
            },
            num_scan_inputs = QUERY_INPUTS
          > (place_head, BY_QUERY_head)
        },
        num_scan_inputs = ALL_INPUTS
      > (places, BY_QUERY_tiles, BY_KEY_heads)
      value_last = Shape <start = 3, end = 4> (value)
      as_y = Concat <axis = 0> (rows_all, heads_all, others, value_last)
      y_runs = Reshape (tiles_y, as_y)
      several_y = Slice (y_runs, same, n_1, axis_2)"""


def tiled(by_query: Mapping[str, str], by_key: Mapping[str, str], seen: str) -> str:
    """Lines for several tokens.

    Args:
        by_query: under NAME, of which a tile has NAME_tile [c, f], values [B, H, N, f].
        by_key: under NAME, of which a head has NAME_all [M, ...], values [B, G, M, ...].
        seen: lines that make `visible` [c, M] of a tile from these, place_tile [1, c], and the
            numbers of keys, key_column [M, 1], in 32 bits.
    """
    keys = {"key": "used_key", "value": "used_value", **by_key}
    lines = _BEFORE
    for text, values in ((_BY_QUERY, by_query), (_BY_KEY, keys)):
        for name, value in values.items():
            lines += text.replace("NAME", name).replace("VALUE", value)
    queries = ["q", *by_query]
    scans = _TILES.replace("QUERY_INPUTS", str(len(queries) + 1))
    scans = scans.replace("ALL_INPUTS", str(len(queries) + len(keys) + 1))
    for word, names in (("BY_QUERY", queries), ("BY_KEY", keys)):
        for end in ("head", "tiles", "tile", "all", "heads"):
            listed = ", ".join(f"{name}_{end}" for name in names)
            scans = scans.replace(f"{word}_{end})", f"{listed})")
            scans = scans.replace(f"{word}_{end},", f"{listed},")
    return lines + scans.replace("SEEN", seen)
