"""Attention to whatever a mask shows, for nodes without states, in ONNX's textual syntax.

In long sequences 64 queries of a head gather the rows that one of them sees, where those are less
than most, and meet them under their part of the mask: mask, rows and scores stay in a processor's
cache from the first product to the second. Short ones form every score at once. Letters: B batch, H
query heads, G key/value heads, J = H / G, N queries, M keys, R tiles of c queries, K rows that a
tile reads, d and e widths.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import RUNS, every_score, meeting

#: keys from which on a mask is read tile by tile
LONG = 512

# scanned by tile [R, ...], and inside by KV head [B G, ...]
_TILES = f"""
      run_most = Constant <value_int = @TILE> (){RUNS}
      batch_1 = Shape <start = 0, end = 1> (q)
      heads_1 = Shape <start = 1, end = 2> (q)
      width_1 = Shape <start = 3, end = 4> (q)
      value_width_1 = Shape <start = 3, end = 4> (value)
      pairs_1 = Mul (batch_1, g)
      as_groups = Concat <axis = 0> (batch_1, g, others, runs_1, run_c_1, width_1)
      q_groups = Reshape (q_regions, as_groups)
      q_by_tile = Transpose <perm = [3, 0, 1, 2, 4, 5]> (q_groups)
      as_q_tiles = Concat <axis = 0> (runs_1, pairs_1, others, width_1)
      q_any = Reshape (q_by_tile, as_q_tiles)
      q_tiles = Mul (q_any, factor)
      as_keys = Concat <axis = 0> (pairs_1, m_1, width_1)
      key_pairs = Reshape (key, as_keys)
      as_values = Concat <axis = 0> (pairs_1, m_1, value_width_1)
      value_pairs = Reshape (value, as_values)
      seen_n = Shape <start = 2, end = 3> (seen)
      one_1 = Unsqueeze (one, axis_0)
      seen_last = Sub (seen_n, one_1)
      seen_at = Min (run_at, seen_last)
      as_at_tiles = Concat <axis = 0> (runs_1, run_c_1)
      at_tiles = Reshape (seen_at, as_at_tiles)
      by_pair = Concat <axis = 0> (batch_1, heads_1, one_1, one_1)
      as_seen_pairs = Concat <axis = 0> (pairs_1, others, m_1)
      each_shape = Concat <axis = 0> (one_1, run_c_1)
      each_query = ConstantOfShape <value: tensor = float[1] {{1.0}}> (each_shape)
      three = Constant <value_int = 3> ()
      four = Constant <value_int = 4> ()
      m_three = Mul (m, three)
      tiles_y = Scan <
        body = of_tile (tile_q, tile_at) => (tile_y)
        {{
          seen_tile = Gather <axis = 2> (seen, tile_at)
          seen_float = Cast <to = 1> (seen_tile)
          seen_many = MatMul (each_query, seen_float)
          seen_heads = Expand (seen_tile, by_pair)
          many_heads = Expand (seen_many, by_pair)
          tile_seen = Reshape (seen_heads, as_seen_pairs)
          tile_many = Reshape (many_heads, as_seen_pairs)
          tile_y = Scan <
            body = of_pair (own_q, own_key, own_value, own_seen, own_many) => (pair_y)
            {{
              many_of_all = ReduceSum <keepdims = 0> (own_many, axis_0)
              is_read = Greater (many_of_all, shown_score)
              rows_1 = NonZero (is_read)
              rows = Squeeze (rows_1, axis_0)
              rows_many = Size (rows)
              rows_four = Mul (rows_many, four)
              is_less = Less (rows_four, m_three)
              is_some = Greater (rows_many, zero)
              is_few = And (is_less, is_some)
              pair_y = If (is_few) <
                then_branch = of_rows () => (few_y)
                {{
                  read_key = Gather (own_key, rows)
                  read_value = Gather (own_value, rows)
                  seen_t = Transpose <perm = [1, 0]> (own_seen)
                  seen_read_t = Gather (seen_t, rows)
                  visible = Transpose <perm = [1, 0]> (seen_read_t){
    meeting("own_q", "read_key", "read_value", "few_y")
}
                }},
                else_branch = of_all () => (all_y)
                {{
                  visible = Identity (own_seen){meeting("own_q", "own_key", "own_value", "all_y")}
                }}
              >
            }},
            num_scan_inputs = 5
          > (tile_q, key_pairs, value_pairs, tile_seen, tile_many)
        }},
        num_scan_inputs = 2
      > (q_tiles, at_tiles)
      as_y_groups = Concat <axis = 0> (runs_1, batch_1, g, others, run_c_1, value_width_1)
      y_groups = Reshape (tiles_y, as_y_groups)
      y_by_head = Transpose <perm = [1, 2, 3, 0, 4, 5]> (y_groups)
      as_y = Concat <axis = 0> (batch_1, heads_1, others, value_width_1)
      y_runs = Reshape (y_by_head, as_y)
      long_y = Slice (y_runs, same, n_1, axis_2)"""

_MASKED = f"""
      m_1 = Shape <start = 2, end = 3> (key)
      m = Squeeze (m_1, axis_0)
      long = Constant <value_int = @LONG> ()
      is_long_mask = Less (long, m)
      masked_y = If (is_long_mask) <
        then_branch = by_tile () => (long_y)
        {{{_TILES}
        }},
        else_branch = at_once () => (short_y)
        {{
          visible = Identity (seen){every_score("key", "value", "short_y")}
        }}
      >"""


def masked() -> str:
    """Lines that make `masked_y` [B, H, N, e] from q, key, value and `seen` [B, H, N, M], of which
    any of the first three sizes may be 1."""
    return _MASKED.replace("@LONG", str(LONG))
