"""The bodies of `Attention` and `LatentAttention`, in ONNX's textual syntax: all keys behind one.

Both take the *row-wise* form: the query heads that share keys become rows of one matrix product, so
a decode step reads the cache once and not once per head (on a CPU 2 to 3 times faster than the
Attention op for latent rows). Few queries meet all rows of a state, of which nothing is copied.
Several are cut into tiles, and a tile of all heads meets the rows from the first to the last that
one of its queries sees: half of a prompt's pairs, of a window hardly more than the window's, and
none of a state's rows that nothing was written to. Scores are those of a tile, [B, H, c, K].

Where some layer has no rotary part (R = 0) the latent body branches on it, because a product over
zero columns is not zero in ONNX Runtime 1.31 (its fused transposed MatMul leaves the output unset).
Elsewhere the branch is left out: it cannot fold, and costs a subgraph call per layer.

Letters: B rows, H query heads, G KV heads, N new tokens, M rows of a state, K of them that a tile
reads, c queries of a tile, d, e, r and R widths.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import CAP, RUN_AT, every_score, finished

#: queries that meet their rows together: more share what is copied, fewer have fewer hidden pairs
DENSE_TILE = 128
#: queries that meet all rows of a state
FEW = 16

INPUTS = {
    "Attention": ("q", "key", "value", "kv_start", "kv_len"),
    "LatentAttention": ("q_nope", "q_rope", "latent", "rope", "kv_start", "kv_len"),
}

# Queries see rows from `first_bn` to `last_bn` [B, N or 1]; `alive`, where that is any.
_BODY = f"""NAME <scale: float, causal: int = 1, sliding_window: int = 0, softcap: float = 0.0>
(INPUTS) => (y)
{{
  same = Constant <value_ints = [0]> ()
  others = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  axis_13 = Constant <value_ints = [1, 3]> ()
  shown_score = Constant <value_float = 0.0> ()
  hidden_score = Constant <value_float = -1.0e38> ()
SIZES_OF
  n = Squeeze (n_1, axis_0)
  m = Squeeze (m_1, axis_0)
CAP_LINES
  start_any = Cast <to = 7> (kv_start)
  length_any = Cast <to = 7> (kv_len)
  start_b1 = Unsqueeze (start_any, axis_1)
  length_b1 = Unsqueeze (length_any, axis_1)
  query = Range (zero, n, one)
  before = Sub (length_b1, n_1)
  index_bn = Add (before, query)
  causal_int = Constant <value_int: int = @causal> ()
  is_causal = Greater (causal_int, zero)
  last_bn = If (is_causal) <
    then_branch = up_to_itself () => (then_last)
    {{
      then_last = Identity (index_bn)
    }},
    else_branch = up_to_the_end () => (else_last)
    {{
      else_last = Sub (length_b1, one)
    }}
  >
  window = Constant <value_int: int = @sliding_window> ()
  has_window = Greater (window, zero)
  first_bn = If (has_window) <
    then_branch = from_the_window () => (then_first)
    {{
      window_less = Sub (window, one)
      window_start = Sub (index_bn, window_less)
      then_first = Max (window_start, start_b1)
    }},
    else_branch = from_the_start () => (else_first)
    {{
      else_first = Identity (start_b1)
    }}
  >
  first_all = Unsqueeze (first_bn, axis_13)
  last_all = Unsqueeze (last_bn, axis_13)
  alive = LessOrEqual (first_all, last_all)
  few = Constant <value_int = FEW> ()
  is_several = Greater (n, few)
  y_any = If (is_several) <
    then_branch = tile_by_tile () => (several_y)
    {{
      run_most = Constant <value_int = DENSE_TILE> (){RUN_AT}
      as_tiles = Concat <axis = 0> (runs_1, run_c_1)
      at_tiles = Reshape (run_at, as_tiles)
      every_query = Shape (index_bn)
      first_n = Expand (first_bn, every_query)
      last_n = Expand (last_bn, every_query)
      last_row = Sub (m, one)
Y_TILES
      y_apart = Transpose <perm = [1, 2, 0, 3, 4]> (y_tiles)
      as_y = Concat <axis = 0> (same, same, others, e_1)
      y_runs = Reshape (y_apart, as_y)
      several_y = Slice (y_runs, same, n_1, axis_2)
    }},
    else_branch = over_all_rows () => (few_y)
    {{
      row = Range (zero, m, one)
      after_first = GreaterOrEqual (row, first_all)
      before_last = LessOrEqual (row, last_all)
      visible = And (after_first, before_last)
MEET_FEW
    }}
  >
  nothing = CastLike (shown_score, y_any)
  y = Where (alive, y_any, nothing)
}}"""

_TILES = """
      MADE = Scan <
        body = of_tile (at_tile) => (tile_y)
        {
          first_tile = Gather <axis = 1> (first_n, at_tile)
          last_tile = Gather <axis = 1> (last_n, at_tile)
          from_any = ReduceMin <keepdims = 0> (first_tile)
          until_any = ReduceMax <keepdims = 0> (last_tile)
          until_in = Clip (until_any, zero, last_row)
          from_row = Clip (from_any, zero, until_in)
          until_row = Add (until_in, one)
          from_1 = Unsqueeze (from_row, axis_0)
          until_1 = Unsqueeze (until_row, axis_0)
          row = Range (from_row, until_row, one)
          first = Unsqueeze (first_tile, axis_13)
          last = Unsqueeze (last_tile, axis_13)
          after_first = GreaterOrEqual (row, first)
          before_last = LessOrEqual (row, last)
          visible = And (after_first, before_last)
MEET_TILE
        },
        num_scan_inputs = 1
      > (at_tiles)"""
# Tiles of a window hide much of what they read, others their own pairs along the diagonal only. The
# condition depends on lengths: of an If in a branch that it folds, ONNX Runtime 1.31 loses inputs.
_BOTH_TILES = """
      longest = ReduceMax <keepdims = 0> (length_b1)
      is_shorter = Less (window, longest)
      is_near = And (has_window, is_shorter)
      y_tiles = If (is_near) <
        then_branch = near_the_tile () => (near_tiles)
        {NEAR
        },
        else_branch = up_to_the_tile () => (all_tiles)
        {ALL
        }
      >"""

_DENSE_SIZES = """  n_1 = Shape <start = 2, end = 3> (q)
  m_1 = Shape <start = 2, end = 3> (key)
  g = Shape <start = 1, end = 2> (key)
  e_1 = Shape <start = 3, end = 4> (value)
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q)"""
_DENSE_READS = f"""
          tile_q = Gather <axis = 2> (q, at_tile)
          tile_key = Slice (key, from_1, until_1, axis_2)
          tile_value = Slice (value, from_1, until_1, axis_2){
    every_score("tile_key", "tile_value", "tile_y", "tile_q", "run_c_1")
}"""

_LATENT_SIZES = """  n_1 = Shape <start = 2, end = 3> (q_nope)
  m_1 = Shape <start = 1, end = 2> (latent)
  e_1 = Shape <start = 2, end = 3> (latent)
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q_nope)"""
# QUERY_nope and QUERY_rope [B, H, MANY, ...] meet ROW_latent and ROW_rope [B, K, ...].
_LATENT = """
      rows_of_r = Concat <axis = 0> (same, others, e_1)
      nope_rows = Reshape (QUERY_nope, rows_of_r)
      nope_scaled = Mul (nope_rows, factor)
      latent_t = Transpose <perm = [0, 2, 1]> (ROW_latent)
      nope_scores = MatMul (nope_scaled, latent_t)ROPE
      keys_1 = Shape <start = 1, end = 2> (ROW_latent)
      score_shape = Concat <axis = 0> (same, others, MANY_ROWS, keys_1)
      scores_any = Reshape (score_rows, score_shape)
MANY_WEIGHTS
      as_weight_rows = Concat <axis = 0> (same, others, keys_1)
      weight_rows = Reshape (weights, as_weight_rows)
      y_rows = MatMul (weight_rows, ROW_latent)
      y_shape = Concat <axis = 0> (same, others, MANY_ROWS, e_1)
      RESULT = Reshape (y_rows, y_shape)"""
_ROPE = """
      rotary = Shape <start = 2, end = 3> (rope)
      rows_of_rotary = Concat <axis = 0> (same, others, rotary)
      rope_rows = Reshape (QUERY_rope, rows_of_rotary)
      rope_scaled = Mul (rope_rows, factor)
      rope_t = Transpose <perm = [0, 2, 1]> (ROW_rope)
      rope_scores = MatMul (rope_scaled, rope_t)
      score_rows = Add (nope_scores, rope_scores)"""
_ROPE_OR_NONE = """
      rotary = Shape <start = 2, end = 3> (rope)
      no_columns = Constant <value_int = 0> ()
      is_rotary = Greater (rotary, no_columns)
      score_rows = If (is_rotary) <
        then_branch = with_rope () => (then_rows)
        {
          many_rows = Shape <start = 0, end = 2> (nope_rows)
          rows_of_rotary = Concat <axis = 0> (many_rows, rotary)
          rope_rows = Reshape <allowzero = 1> (QUERY_rope, rows_of_rotary)
          rope_scaled = Mul (rope_rows, factor)
          rope_t = Transpose <perm = [0, 2, 1]> (ROW_rope)
          rope_scores = MatMul (rope_scaled, rope_t)
          then_rows = Add (nope_scores, rope_scores)
        },
        else_branch = without_rope () => (else_rows)
        {
          else_rows = Identity (nope_scores)
        }
      >"""
_LATENT_READS = """
          tile_nope = Gather <axis = 2> (q_nope, at_tile)
          tile_rope = Gather <axis = 2> (q_rope, at_tile)
          read_latent = Slice (latent, from_1, until_1, axis_1)
          read_rope = Slice (rope, from_1, until_1, axis_1)"""


def _latent(query: str, row: str, result: str, many: str, rope: str) -> str:
    text = _LATENT.replace("ROPE", rope).replace("QUERY_", query).replace("ROW_", row)
    return text.replace("RESULT", result).replace("MANY_ROWS", many)


def dense_body(
    name: str, rope_may_be_empty: bool = True, capped: bool = True, sliding: bool = True
) -> str:
    """The function `ai.reattend::<name>` of `INPUTS`.

    Args:
        name: of the node.
        rope_may_be_empty: some latent node has R = 0.
        capped: some node may have a softcap.
        sliding: some node may have a window.
    """
    if name == "Attention":
        sizes, tile = _DENSE_SIZES, _DENSE_READS
        few = every_score("key", "value", "few_y")
    else:
        rope = _ROPE_OR_NONE if rope_may_be_empty else _ROPE
        sizes, few = _LATENT_SIZES, _latent("q_", "", "few_y", "n_1", rope)
        tile = _LATENT_READS + _latent("tile_", "read_", "tile_y", "run_c_1", rope)
    scan = _TILES.replace("MEET_TILE", tile[1:])
    plain = scan.replace("MANY_WEIGHTS", "MANY_BIAS\nBY_BIAS")
    lifted = scan.replace("MANY_WEIGHTS", "MANY_BIAS\nMANY_BY_BIAS")
    tiles = plain.replace("MADE", "y_tiles")
    if sliding:
        both = _BOTH_TILES.replace("NEAR", lifted.replace("MADE", "near_tiles"))
        tiles = both.replace("ALL", plain.replace("MADE", "all_tiles"))
    text = _BODY.replace("NAME", name).replace("(INPUTS)", f"({', '.join(INPUTS[name])})")
    text = text.replace("SIZES_OF", sizes).replace("CAP_LINES", CAP[1:] if capped else "")
    few = few.replace("MANY_WEIGHTS", "SOFTMAX")
    text = text.replace("\nY_TILES", tiles).replace("MEET_FEW", few[1:])
    text = text.replace("DENSE_TILE", str(DENSE_TILE)).replace("FEW", str(FEW))
    return finished(text, capped)
