"""The body of `RoutedAttention`: heads that a token leaves out give 0, and are not computed for it.

Few queries (`FEW` at most) take every head's output from `Attention` and hide what is left out: a
decode step would have to copy the keys of a KV group in order to leave others unread, which costs
ONNX Runtime more than reading all where they are many. More queries are gathered: for each row of
the batch, unit (a query head, or a KV group with the heads that read it) and stretch of `STRETCH`
queries, those that use the unit meet the rows of its group that the stretch may see, and their
outputs are scattered back. kernels/bench/onnx_routed.py measures both.
"""

from __future__ import annotations

from reattend.targets.onnx.fragments import CAP, CAPPED, NOT_CAPPED

NAME = "RoutedAttention"
#: queries up to which all heads are computed
FEW = 16
#: queries that are gathered together: fewer see fewer rows that are hidden from them, more make
#: larger products
STRETCH = 128

_BODY = """RoutedAttention
<scale: float, causal: int = 1, sliding_window: int = 0, softcap: float = 0.0>
(q, key, value, active, kv_start, kv_len) => (y)
{
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q)
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  few = Constant <value_int = FEW> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  others = Constant <value_ints = [-1]> ()
  hidden_score = Constant <value_float = -1.0e38> ()
  nothing_float = Constant <value_float = 0.0> ()
  nothing = CastLike (nothing_float, q)
  b_1 = Shape <start = 0, end = 1> (q)
  h_1 = Shape <start = 1, end = 2> (q)
  n_1 = Shape <start = 2, end = 3> (q)
  n = Squeeze (n_1, axis_0)
  d_1 = Shape <start = 3, end = 4> (q)
  e_1 = Shape <start = 3, end = 4> (value)
  u_1 = Shape <start = 1, end = 2> (active)
  g_1 = Shape <start = 1, end = 2> (key)
  each_1 = Div (h_1, u_1)
  many = Greater (n, few)
  y = If (many) <
    then_branch = gathered () => (then_y)
    {
      u = Squeeze (u_1, axis_0)
      g = Squeeze (g_1, axis_0)
      units_1 = Mul (b_1, u_1)
      units = Squeeze (units_1, axis_0)
      q_shape = Concat <axis = 0> (units_1, each_1, n_1, d_1)
      q_units = Reshape (q, q_shape)
      stretch = Constant <value_int = STRETCH> ()
      stretch_less = Sub (stretch, one)
      n_more = Add (n, stretch_less)
      stretches = Div (n_more, stretch)
      n_whole = Mul (stretches, stretch)
      n_spare = Sub (n_whole, n)
      n_spare_1 = Unsqueeze (n_spare, axis_0)
      spare_shape = Concat <axis = 0> (b_1, u_1, n_spare_1)
      unused_int = Expand (zero, spare_shape)
      unused = Cast <to = 9> (unused_int)
      active_more = Concat <axis = 2> (active, unused)
      stretch_1 = Unsqueeze (stretch, axis_0)
      active_shape = Concat <axis = 0> (others, stretch_1)
      active_units = Reshape (active_more, active_shape)
      m_1 = Shape <start = 2, end = 3> (key)
      key_rows_shape = Concat <axis = 0> (others, m_1, d_1)
      key_groups = Reshape (key, key_rows_shape)
      value_rows_shape = Concat <axis = 0> (others, m_1, e_1)
      value_groups = Reshape (value, value_rows_shape)
      starts = Cast <to = 7> (kv_start)
      lengths = Cast <to = 7> (kv_len)
      causal_int = Constant <value_int: int = @causal> ()
      is_causal = Greater (causal_int, zero)
      window = Constant <value_int: int = @sliding_window> ()
      has_window = Greater (window, zero)
      endless = Constant <value_int = 4611686018427387904> ()
      reach = Where (has_window, window, endless)
CAP
      empty_shape = Concat <axis = 0> (stretch_1, each_1, e_1)
      empty = Expand (nothing, empty_shape)
      going = Cast <to = 9> (one)
      pieces = Mul (units, stretches)
      y_units = Loop (pieces, going) <
        body = of_a_piece (int64 number, bool go_in) => (go, y_unit)
        {
          go = Identity (go_in)
          of_unit = Div (number, stretches)
          of_queries = Mod (number, stretches)
          from_query = Mul (of_queries, stretch)
          row = Div (of_unit, u)
          unit = Mod (of_unit, u)
          unit_first = Mul (unit, g)
          group = Div (unit_first, u)
          row_first = Mul (row, g)
          place = Add (row_first, group)
          mine = Gather <axis = 0> (active_units, number)
          at_2 = NonZero (mine)
          at = Squeeze (at_2, axis_0)
          at_query = Add (at, from_query)
          unit_1 = Unsqueeze (of_unit, axis_0)
          unit_next = Add (unit_1, axis_1)
          query_1 = Unsqueeze (from_query, axis_0)
          query_next = Add (query_1, stretch_1)
          of_stretch = Concat <axis = 0> (unit_1, query_1)
          stretch_end = Concat <axis = 0> (unit_next, query_next)
          axes_02 = Constant <value_ints = [0, 2]> ()
          q_stretch_one = Slice (q_units, of_stretch, stretch_end, axes_02)
          q_stretch = Squeeze (q_stretch_one, axis_0)
          q_some = Gather <axis = 1> (q_stretch, at)
          q_scaled = Mul (q_some, factor)
          start = Gather <axis = 0> (starts, row)
          length = Gather <axis = 0> (lengths, row)
          before = Sub (length, n)
          from_index = Add (before, from_query)
          until_index = Add (from_index, stretch)
          until_causal = Min (until_index, length)
          until = Where (is_causal, until_causal, length)
          from_looks = Sub (from_index, reach)
          from_near = Add (from_looks, one)
          from = Max (from_near, start)
          until_1 = Unsqueeze (until, axis_0)
          from_1 = Unsqueeze (from, axis_0)
          place_1 = Unsqueeze (place, axis_0)
          place_next = Add (place_1, axis_1)
          corner = Concat <axis = 0> (place_1, from_1)
          corner_end = Concat <axis = 0> (place_next, until_1)
          axes_01 = Constant <value_ints = [0, 1]> ()
          key_one = Slice (key_groups, corner, corner_end, axes_01)
          key_some = Squeeze (key_one, axis_0)
          value_one = Slice (value_groups, corner, corner_end, axes_01)
          value_some = Squeeze (value_one, axis_0)
          key_t = Transpose <perm = [1, 0]> (key_some)
          scores_own = MatMul (q_scaled, key_t)
          scores = Cast <to = 1> (scores_own)
CAPPED
          index = Add (before, at_query)
          until_end = Sub (length, one)
          last = Where (is_causal, index, until_end)
          looks_back = Sub (index, reach)
          near = Add (looks_back, one)
          first = Max (near, start)
          first_c = Unsqueeze (first, axis_1)
          last_c = Unsqueeze (last, axis_1)
          rows = Range (from, until, one)
          after_first = GreaterOrEqual (rows, first_c)
          before_last = LessOrEqual (rows, last_c)
          visible = And (after_first, before_last)
          is_hidden = Not (visible)
          hidden_byte = Cast <to = 2> (is_hidden)
          bias = DequantizeLinear (hidden_byte, hidden_score)
          masked = Add (capped, bias)
          weights_float = Softmax <axis = -1> (masked)
          weights = CastLike (weights_float, scores_own)
          y_any = MatMul (weights, value_some)
          alive = LessOrEqual (first_c, last_c)
          y_some = Where (alive, y_any, nothing)
          y_by_query = Transpose <perm = [1, 0, 2]> (y_some)
          at_c = Unsqueeze (at, axis_1)
          y_unit = ScatterND (empty, at_c, y_by_query)
        }
      >
      by_unit = Concat <axis = 0> (b_1, u_1, others, each_1, e_1)
      y_whole = Reshape (y_units, by_unit)
      none = Constant <value_ints = [0]> ()
      y_5 = Slice (y_whole, none, n_1, axis_2)
      y_heads = Transpose <perm = [0, 1, 3, 2, 4]> (y_5)
      y_shape = Concat <axis = 0> (b_1, h_1, n_1, e_1)
      then_y = Reshape (y_heads, y_shape)
    },
    else_branch = all_heads () => (else_y)
    {
      y_all = ai.reattend.Attention <scale: float = @scale, causal: int = @causal,
        sliding_window: int = @sliding_window, softcap: float = @softcap>
        (q, key, value, kv_start, kv_len)
      by_head = Concat <axis = 0> (b_1, u_1, each_1, n_1)
      active_1 = Unsqueeze (active, axis_2)
      active_4 = Expand (active_1, by_head)
      head_shape = Concat <axis = 0> (b_1, h_1, n_1, axis_1)
      used = Reshape (active_4, head_shape)
      else_y = Where (used, y_all, nothing)
    }
  >
}"""


def routed_body(capped: bool) -> str:
    """In ONNX's textual syntax, without the line of its domains.

    Args:
        capped: some node may have a softcap.
    """
    body = _BODY.replace("CAPPED", CAPPED if capped else NOT_CAPPED)
    return (
        body.replace("CAP", CAP if capped else "")
        .replace("FEW", str(FEW))
        .replace("STRETCH", str(STRETCH))
    )
