"""Lines that the bodies of several nodes share, in ONNX's textual syntax.

What an attribute decides is an If with a constant condition: a runtime folds it when it loads the
file.
"""

from __future__ import annotations

#: the softcap, and whether there is one
CAP = """
  cap = Constant <value_float: float = @softcap> ()
  zero_float = Constant <value_float = 0.0> ()
  is_capped = Greater (cap, zero_float)"""

#: scores -> capped
CAPPED = """
  capped = If (is_capped) <
    then_branch = with_cap () => (then_scores)
    {
      shrunk = Div (scores, cap)
      bent = Tanh (shrunk)
      then_scores = Mul (bent, cap)
    },
    else_branch = without_cap () => (else_scores)
    {
      else_scores = Identity (scores)
    }
  >"""
NOT_CAPPED = """
  capped = Identity (scores)"""

# Constants, the factor of queries, and sizes.
_SIZES = """
  scale_float = Constant <value_float: float = @scale> ()
  factor = CastLike (scale_float, q)
  shown_score = Constant <value_float = 0.0> ()
  hidden_score = Constant <value_float = -1.0e38> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  same = Constant <value_ints = [0]> ()
  others = Constant <value_ints = [-1]> ()
  n_1 = Shape <start = 2, end = 3> (q)
  n = Squeeze (n_1, axis_0)
  g = Shape <start = 1, end = 2> (key)"""

# Where the tokens of a call stand, and how far the block itself looks back.
_SPAN = """
  endless = Constant <value_int = 4611686018427387904> ()
  own = Constant <value_int: int = @sliding_window> ()
  is_own = Greater (own, zero)
  reach = Where (is_own, own, endless)
  start = Cast <to = 7> (kv_start)
  lengths = Cast <to = 7> (kv_len)"""

# visible -> bias
_BIAS = """
  bias = Where (visible, shown_score, hidden_score)"""
# scores_any, bias -> weights in the scores' dtype. The softmax is in float32. The mask is added: a
# Where over all heads takes ONNX Runtime twice as long.
_BY_BIAS = """
  scores = Cast <to = 1> (scores_any)
CAPPED
  masked = Add (capped, bias)
  weights_float = Softmax <axis = -1> (masked)
  weights = CastLike (weights_float, scores_any)"""

# The same for many queries. A byte becomes 0 or the hidden score several times as fast as by Where.
_LIFTED_BIAS = """
  is_hidden_score = Not (visible)
  hidden_byte = Cast <to = 2> (is_hidden_score)
  bias = DequantizeLinear (hidden_byte, hidden_score)"""
# What is hidden is lifted to 64 below a query's highest score: a weight of 1e-28, nothing beside
# its sum of 1, and no exponential that underflows. A processor may take 14 times as long over those
# (vectors of numbers below 1e-38).
LIFT = """
  far_below = Constant <value_float = 64.0> ()
  most_score = ReduceMax <keepdims = 1> (masked, others)
  least_score = Sub (most_score, far_below)
  lifted_scores = Max (masked, least_score)"""
_LIFTED_BY_BIAS = f"""
  scores = Cast <to = 1> (scores_any)
CAPPED
  masked = Add (capped, bias){LIFT}
  weights_float = Softmax <axis = -1> (lifted_scores)
  weights = CastLike (weights_float, scores_any)"""


# One token's queries in rows, by KV head, over all rows of a state. They are scaled before they get
# their shape: ONNX Runtime makes a scale of a product's own input a part of the product, which then
# is not the one that is quick for a single row, and takes half as long again.
_ONE_TOKEN = """
      by_group = Concat <axis = 0> (same, g, others, same)
      q_scaled = Mul (q, factor)
      q_rows = Reshape (q_scaled, by_group)
      key_t = Transpose <perm = [0, 1, 3, 2]> (KEY)
      scores_any = MatMul (q_rows, key_t)
SOFTMAX
      y_rows = MatMul (weights, VALUE)
      by_head = Concat <axis = 0> (same, others, n_1, same)
      step_y = Reshape (y_rows, by_head)"""


def one_token(key: str, value: str) -> str:
    """Lines that make `step_y` of one token, q, from `visible` and all rows of these values."""
    return _ONE_TOKEN.replace("KEY", key).replace("VALUE", value)


# every query of a call with all rows of a key and a value that queries share, under a mask
_EVERY_SCORE = """
      by_group = Concat <axis = 0> (same, g, others, same)
      q_scaled = Mul (QUERY, factor)
      q_rows = Reshape (q_scaled, by_group)
      key_t = Transpose <perm = [0, 1, 3, 2]> (KEY)
      score_rows = MatMul (q_rows, key_t)
      by_head = Concat <axis = 0> (same, others, MANY_ROWS, same)
      scores_any = Reshape (score_rows, SHAPE)
MANY_WEIGHTS
      score_rows_shape = Shape (score_rows)
      weight_rows = Reshape (weights, score_rows_shape)
      y_rows = MatMul (weight_rows, VALUE)
      RESULT = Reshape (y_rows, by_head)"""


def every_score(
    key: str,
    value: str,
    result: str,
    query: str = "q",
    many: str = "n_1",
    shape: str = "by_head",
) -> str:
    """Lines that make `result` [B, H, N, e] of queries from `visible` and all rows of these values.

    Args:
        key, value, result, query: names.
        many: how many queries there are.
        shape: of the scores, where `visible` does not broadcast to [B, H, N, M].
    """
    text = _EVERY_SCORE.replace("KEY", key).replace("VALUE", value).replace("QUERY", query)
    return text.replace("MANY_ROWS", many).replace("RESULT", result).replace("SHAPE", shape)


#: all rows of all heads together, and where those of a query head begin
ROWS_TOGETHER = """
      texts_1 = Shape <start = 0, end = 1> (q)
      heads_all_1 = Shape <start = 1, end = 2> (q)
      held_1 = Shape <start = 2, end = 3> (key)
      key_width_1 = Shape <start = 3, end = 4> (key)
      value_width_1 = Shape <start = 3, end = 4> (value)
      pairs_1 = Mul (texts_1, g)
      pairs_all = Squeeze (pairs_1, axis_0)
      pair_number = Range (zero, pairs_all, one)
      pair_first = Mul (pair_number, held_1)
      each_one = Constant <value_ints = [1]> ()
      as_pairs = Concat <axis = 0> (texts_1, g, each_one)
      pair_rows = Reshape (pair_first, as_pairs)
      heads_each_1 = Div (heads_all_1, g)
      by_member = Concat <axis = 0> (texts_1, g, heads_each_1)
      member_rows = Expand (pair_rows, by_member)
      by_text_head = Concat <axis = 0> (texts_1, heads_all_1, each_one)
      head_first = Reshape (member_rows, by_text_head)
      by_text_head_4 = Concat <axis = 0> (by_text_head, each_one)
      as_key_rows = Concat <axis = 0> (others, key_width_1)
      as_value_rows = Concat <axis = 0> (others, value_width_1)
      keys_together = Reshape (key, as_key_rows)
      values_together = Reshape (value, as_value_rows)"""
#: own_q [B, H, c, d], rows_in [B, H, K] and own_seen [B or 1, H or 1, c or 1, K or 1] of one region
#: -> y_region [B, H, c, e], one head after another; behind `ROWS_TOGETHER`. Rows of a head are
#: those of all heads from `head_first` on: one that is not below M would be another head's.
OWN_ROWS = """
      rows_of_head = Add (rows_in, head_first)
      own_list_1 = Shape <start = 2> (rows_in)
      as_own_rows = Concat <axis = 0> (others, own_list_1)
      rows_by_head = Reshape (rows_of_head, as_own_rows)
      own_scaled = Mul (own_q, factor)
      own_sizes = Shape <start = 2> (own_q)
      as_own_q = Concat <axis = 0> (others, own_sizes)
      q_by_head = Reshape (own_scaled, as_own_q)
      seen_sizes = Shape <start = 2> (own_seen)
      as_own_seen = Concat <axis = 0> (others, seen_sizes)
      seen_each = Expand (own_seen, by_text_head_4)
      seen_by_head = Reshape (seen_each, as_own_seen)
      y_by_own_head = Scan <
        body = of_own_head (head_q, head_rows, visible) => (head_y)
        {
          read_key = Gather (keys_together, head_rows)
          read_value = Gather (values_together, head_rows)
          key_t = Transpose <perm = [1, 0]> (read_key)
          scores_any = MatMul (head_q, key_t)
MANY_WEIGHTS
          head_y = MatMul (weights, read_value)
        },
        num_scan_inputs = 3
      > (q_by_head, rows_by_head, seen_by_head)
      own_c_1 = Shape <start = 2, end = 3> (own_q)
      as_y_region = Concat <axis = 0> (texts_1, heads_all_1, own_c_1, value_width_1)
      y_region = Reshape (y_by_own_head, as_y_region)"""


def meeting(query: str, key: str, value: str, result: str) -> str:
    """Lines that make `result` [c, e] of a head's scaled queries [c, d] from `visible` and rows."""
    return f"""
                  key_t = Transpose <perm = [1, 0]> ({key})
                  scores_any = MatMul ({query}, key_t)
MANY_WEIGHTS
                  {result} = MatMul (weights, {value})"""


#: head_q [J, c, d], head_key [M, d] and head_value [M, e] of one KV head, the `rows` [K] that it
#: reads, and their bias [c, K] -> head_y in the shape as_y_head; q_flat [-1, d], as_scores
#: [-1, c, K] and as_weights [-1, K] are shapes.
ROWS_OF_HEAD = """
          read_key = Gather (head_key, rows)
          read_value = Gather (head_value, rows)
          q_one = Reshape (head_q, q_flat)
          key_t = Transpose <perm = [1, 0]> (read_key)
          scores_one = MatMul (q_one, key_t)
          scores_any = Reshape (scores_one, as_scores)
MANY_BY_BIAS
          weights_one = Reshape (weights, as_weights)
          y_one = MatMul (weights_one, read_value)
          head_y = Reshape (y_one, as_y_head)"""


#: queries of a region: of fewer more rows are copied, of more each reads more that others chose
RUN = 128
#: queries that meet rows of keys together, one head after another
TILE = 64
#: whether they are more than that, and no constant where sizes are fixed: of an `If` that it folds
#: in a branch, ONNX Runtime 1.31 loses what `Scan`s in it read, and crashes
MANY = """
      few = Constant <value_int = @TILE> ()
      is_more = Less (few, n)
      text_length = Gather (lengths, zero)
      is_text = GreaterOrEqual (text_length, zero)
      is_many = And (is_more, is_text)"""
#: queries in the order of the call, `run_most` at a time. The last query fills up the last region;
#: `run_at` says which query stands where.
RUN_AT = """
      run_c = Min (n, run_most)
      run_c_1 = Unsqueeze (run_c, axis_0)
      run_c_less = Sub (run_c, one)
      run_n_up = Add (n, run_c_less)
      runs = Div (run_n_up, run_c)
      runs_1 = Unsqueeze (runs, axis_0)
      run_rows = Mul (runs, run_c)
      run_any = Range (zero, run_rows, one)
      run_last = Sub (n, one)
      run_at = Min (run_any, run_last)"""
#: those queries: q_regions [B, H, R, c, d]
RUNS = f"""{RUN_AT}
      q_run = Gather <axis = 2> (q, run_at)
      as_runs = Concat <axis = 0> (same, same, runs_1, run_c_1, others)
      q_regions = Reshape (q_run, as_runs)"""


def either(condition: str, form: str, masked: str) -> str:
    """Lines for several tokens, `several_y`: of a form of their own where a value says so.

    Args:
        condition: name of that value.
        form, masked: lines; the second under a mask, for every other call.
    """
    form, masked = form.replace("several_y", "form_y"), masked.replace("several_y", "masked_y")
    return f"""
      several_y = If ({condition}) <
        then_branch = in_this_form () => (form_y)
        {{{form}
        }},
        else_branch = under_a_mask () => (masked_y)
        {{{masked}
        }}
      >"""


def finished(body: str, capped: bool) -> str:
    """The body of a node with what stands for COMMON (or SIZES alone), SOFTMAX (of BIAS and
    BY_BIAS) and MANY_WEIGHTS (of MANY_BIAS and MANY_BY_BIAS).

    Args:
        body: with these words on lines of their own.
        capped: some node may have a softcap.
    """
    body = body.replace("COMMON", f"SIZES{_SPAN}")
    body = body.replace("\nSIZES", _SIZES + (CAP if capped else ""))
    body = body.replace("@RUN", str(RUN)).replace("@TILE", str(TILE))
    body = body.replace("MANY_WEIGHTS", "MANY_BIAS\nMANY_BY_BIAS")
    body = body.replace("\nMANY_BIAS", _LIFTED_BIAS).replace("\nMANY_BY_BIAS", _LIFTED_BY_BIAS)
    body = body.replace("SOFTMAX", "BIAS\nBY_BIAS").replace("\nBY_BIAS", _BY_BIAS)
    return body.replace("\nBIAS", _BIAS).replace("CAPPED", CAPPED if capped else NOT_CAPPED)
