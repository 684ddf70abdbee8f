"""The bodies of nodes whose heads choose keys at run time, in ONNX's textual syntax.

Rows of the states are *positions*: left padding is left out when new rows are written, so row j is
token j of its sequence in every row of the batch, blocks of rows are blocks of tokens, and nothing
behind this depends on padding. A row of padding in a call is written where the next real token will
be, and its output means nothing.

One new token reads only what it has chosen: those rows are gathered, beside sinks, a window (the
token itself at least), and the rest is never touched. Few tokens attend under a mask; of more, each
region gathers the rows listed for it (`selected_prompts.py`, `selected_values.py`,
`selected_regions.py`), a block meets the queries that chose it (`selected_routed.py`), or tiles of
queries gather what one of them reads (`selected_tiles.py`, `selected_lines.py`). Calls that read
every row, as those of selectors that leave prompts dense, are calls of `Attention`. What chooses is
`selected_choice.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from reattend.targets.onnx.fragments import MANY, either, every_score, finished
from reattend.targets.onnx.selected_attended import ATTENDED, CERTAIN, inner_caps
from reattend.targets.onnx.selected_choice import (
    BLOCKS,
    BUDGETS,
    COUNTS,
    GATE,
    MASK_OF_BLOCKS,
    PICK_OF_BLOCKS,
    SUMMARY,
    ranking,
)
from reattend.targets.onnx.selected_chunks import (
    CHOICE_OF_CHUNKS,
    MASK_OF_CHUNKS,
    PICK_OF_CHUNKS,
    TILES_OF_CHUNKS,
)
from reattend.targets.onnx.selected_lines import LINE_ATTRIBUTES, TILES_OF_LINES
from reattend.targets.onnx.selected_prompts import POOLED, REGIONS
from reattend.targets.onnx.selected_routed import in_blocks, routed_or
from reattend.targets.onnx.selected_segments import CHUNK_ATTRIBUTES, CHUNKS, PREDICTOR
from reattend.targets.onnx.selected_tokens import (
    BY_LABEL,
    LABELS,
    MASK_OF_TOKENS,
    NOTING,
    PICK_OF_NOTED,
    PICK_OF_TOKENS,
    TILES_OF_LABELS,
)
from reattend.targets.onnx.selected_values import PICK_OF_SCORED, REGIONS_OF_SCORED, SCORED

_NODE = """NAME <ATTRIBUTES>
(INPUTS) => (OUTPUTS)
{
COMMON
  axes_13 = Constant <value_ints = [1, 3]> ()
  last = Sub (n, one)
  past = Sub (lengths, n)
  first = Sub (past, start)
  write = Max (first, zero)
  skipped = Sub (write, first)
  skipped_1 = Unsqueeze (skipped, axis_1)
  query = Range (zero, n, one)
  from_any = Add (skipped_1, query)
  from_bn = Min (from_any, last)
  from_b1n1 = Unsqueeze (from_bn, axes_13)
  one_1 = Unsqueeze (one, axis_0)
  by_key_head = Concat <axis = 0> (one_1, g, one_1, one_1)
  from_rows = Expand (from_b1n1, by_key_head)
  new_key = GatherND <batch_dims = 2> (key, from_rows)
  new_value = GatherND <batch_dims = 2> (value, from_rows)
  present_key = TensorScatter <axis = 2> (past_key, new_key, write)
  present_value = TensorScatter <axis = 2> (past_value, new_value, write)
  room_1 = Shape <start = 2, end = 3> (past_key)
  room = Squeeze (room_1, axis_0)
  last_row = Sub (room, one)
  first_1 = Unsqueeze (first, axis_1)
  place_any = Add (first_1, query)
  place_bn = Max (place_any, zero)
  place = Unsqueeze (place_bn, axes_13)
  sinks_int = Constant <value_int: int = @sinks> ()
  window_int = Constant <value_int: int = @window> ()
  w = Max (window_int, one)
ALWAYS
  is_step = Equal (n, one)
  y = If (is_step) <
    then_branch = step () => (step_y)
    {
STEP
    },
    else_branch = several () => (several_y)
    {
SEVERAL
    }
  >
}"""

# pick [B, S, 1, K]: rows that one token has chosen, and picked: which of them it really has
_GATHERED = """
      sink = Range (zero, sinks_int, one)
      back = Range (zero, w, one)
      window_row = Sub (place, back)
      place_nothing = Mul (place, zero)
      sink_row = Add (place_nothing, sink)
      sink_apart = Sub (place, sink_row)
      sink_old = GreaterOrEqual (sink_apart, w)
      sink_near = Less (sink_apart, reach)
      sink_seen = And (sink_old, sink_near)
      window_real = GreaterOrEqual (window_row, zero)
      back_near = Less (back, reach)
      window_seen = And (window_real, back_near)
      fixed_row = Concat <axis = 3> (sink_row, window_row)
      fixed_seen = Concat <axis = 3> (sink_seen, window_seen)
      choosers = Shape <start = 1, end = 2> (pick)
      by_chooser = Concat <axis = 0> (one_1, choosers, one_1, one_1)
      fixed_rows = Expand (fixed_row, by_chooser)
      fixed_shown = Expand (fixed_seen, by_chooser)
      pick_apart = Sub (place, pick)
      pick_old = GreaterOrEqual (pick_apart, w)
      pick_near = Less (pick_apart, reach)
      pick_late = GreaterOrEqual (pick, sinks_int)
      pick_between = And (pick_old, pick_near)
      pick_other = And (pick_late, pick_between)
      pick_seen = And (picked, pick_other)
      rows_any = Concat <axis = 3> (fixed_rows, pick)
      visible = Concat <axis = 3> (fixed_shown, pick_seen)
      rows_in = Clip (rows_any, zero, last_row)
      as_index = Concat <axis = 0> (same, g, others, one_1)
      row_index = Reshape (rows_in, as_index)
      rows_key = GatherND <batch_dims = 2> (present_key, row_index)
      rows_value = GatherND <batch_dims = 2> (present_value, row_index)
      apart_shape = Concat <axis = 0> (same, choosers, others, same)
      chosen_key = Reshape (rows_key, apart_shape)
      chosen_value = Reshape (rows_value, apart_shape)
      q_scaled = Mul (q, factor)
      q_rows = Reshape (q_scaled, apart_shape)
      key_t = Transpose <perm = [0, 1, 3, 2]> (chosen_key)
      scores_any = MatMul (q_rows, key_t)
SOFTMAX
      y_rows = MatMul (weights, chosen_value)
      by_head = Concat <axis = 0> (same, others, n_1, same)
      step_y = Reshape (y_rows, by_head)"""

# Every row: that is `Attention`. Rows of these states are positions, without padding.
_EVERY_ROW = """
      first_row = Sub (start, start)
      rows_end = Sub (lengths, start)
      RESULT = ai.reattend.Attention <scale: float = @scale, causal = 1,
        sliding_window: int = @sliding_window, softcap: float = @softcap>
        (q, present_key, present_value, first_row, rows_end)"""
_EVERY_STEP = _EVERY_ROW.replace("RESULT", "step_y")
_EVERY = _EVERY_ROW.replace("RESULT", "several_y")

# chosen [B, S, N, M]: what each of several tokens has chosen of the first M rows
_MASKED = """
      total = Gather (lengths, zero)
      total_1 = Unsqueeze (total, axis_0)
CHOSEN
      read_key = Slice (present_key, same, total_1, axis_2)
      read_value = Slice (present_value, same, total_1, axis_2)
      row = Range (zero, total, one)
      apart = Sub (place, row)
      is_past = GreaterOrEqual (apart, zero)
      is_near = Less (apart, reach)
      allowed = And (is_past, is_near)
      in_window = Less (apart, w)
      in_sinks = Less (row, sinks_int)
      is_fixed = Or (in_window, in_sinks)
      wanted = Or (is_fixed, chosen)
      seen = And (allowed, wanted)
      visible = Unsqueeze (seen, axis_2)
      choosers = Shape <start = 1, end = 2> (chosen)
      by_chooser = Concat <axis = 0> (same, choosers, others, n_1, total_1)"""
_MASKED += every_score("read_key", "read_value", "several_y", shape="by_chooser")
_ROUTED = routed_or(_MASKED)


def _in_tiles(tiles: str, chosen: str) -> str:
    """Lines for several tokens: of many, and those that make `chosen` of few."""
    return MANY + either("is_many", tiles, _MASKED.replace("\nCHOSEN", chosen))


@dataclass(frozen=True)
class Kind:
    """A node.

    Attributes:
        options: attributes of its own, and their types in ONNX's words.
        inputs, outputs: beside those that all have: states, and what it knows.
        always: lines for every call.
        step: lines that choose for one token (`pick`, `picked`); None: it reads every row.
        several: lines that choose for several (`chosen`).
        reading: what several do with it.
    """

    options: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    always: str
    step: str | None
    several: str
    reading: str = _MASKED

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """In order."""
        states = ("past_key", "past_value", *self.inputs)
        return ("q", "key", "value", *states, "kv_start", "kv_len")

    @property
    def all_outputs(self) -> tuple[str, ...]:
        """In order."""
        return ("y", "present_key", "present_value", *self.outputs)

    @property
    def attributes(self) -> dict[str, str]:
        """All of them, and their types."""
        common = {"sinks": "int", "window": "int", "sliding_window": "int", "softcap": "float"}
        return {"scale": "float", **self.options, **common}


_BUDGETS = {name: type(none).__name__ for name, none in BUDGETS.items()}
_BLOCK = {"block": "int", **_BUDGETS}
_ENDS = {"first": "int", "last": "int"}
_LABEL_INPUTS, _LABEL = ("past_label", "channels"), ("present_label",)
_SUMMARY = ("present_summary",)
_BY_LABEL = BY_LABEL + MASK_OF_TOKENS
KINDS = {
    "BlocksAttention": Kind(
        _BLOCK, ("past_summary",), _SUMMARY, SUMMARY + BLOCKS, PICK_OF_BLOCKS, MASK_OF_BLOCKS,
        _ROUTED,
    ),
    "AnchoredBlocksAttention": Kind(
        _BLOCK | _ENDS, ("past_summary",), _SUMMARY, SUMMARY + CERTAIN + BLOCKS,
        PICK_OF_BLOCKS, MASK_OF_BLOCKS, _ROUTED,
    ),
    "AttendedBlocksAttention": Kind(
        _BLOCK | _ENDS | {"inv_freq": "floats"}, ("past_summary", "past_recent"),
        ("present_summary", "present_recent"), ATTENDED, PICK_OF_BLOCKS, MASK_OF_BLOCKS, _ROUTED,
    ),
    "GateAttention": Kind(
        _BLOCK, ("past_summary", "query_map", "key_map"), _SUMMARY, SUMMARY + GATE,
        PICK_OF_BLOCKS, MASK_OF_BLOCKS, _ROUTED,
    ),
    "PooledBlocksAttention": Kind(_BLOCK, (), (), "", None, POOLED, REGIONS),
    "VerticalSlashAttention": Kind(LINE_ATTRIBUTES, (), (), "", None, "", TILES_OF_LINES),
    "ChannelsAttention": Kind(
        _BUDGETS, _LABEL_INPUTS, _LABEL, LABELS, BY_LABEL + PICK_OF_TOKENS, "", _EVERY
    ),
    # prompts too
    "EveryChannelsAttention": Kind(
        _BUDGETS, _LABEL_INPUTS, _LABEL, LABELS, BY_LABEL + PICK_OF_TOKENS, "",
        _in_tiles(TILES_OF_LABELS, _BY_LABEL),
    ),
    "ValuesAttention": Kind(
        _BUDGETS, ("past_score", "rate", "gain"), ("present_score",), SCORED, PICK_OF_SCORED, "",
        REGIONS_OF_SCORED,
    ),
    "SegmentsAttention": Kind(
        CHUNK_ATTRIBUTES, ("past_logit", *PREDICTOR), ("present_logit",), CHUNKS,
        PICK_OF_CHUNKS, "", CHOICE_OF_CHUNKS + _in_tiles(TILES_OF_CHUNKS, MASK_OF_CHUNKS),
    ),
    "NotingAttention": Kind({"topk": "int"}, (), ("noted",), NOTING, None, "", _EVERY),
    "NotedAttention": Kind({}, ("noted",), (), "", PICK_OF_NOTED, "", _EVERY),
}  # fmt: skip
#: inputs and outputs that are whole numbers
INTEGERS = ("kv_start", "kv_len", "channels", "noted")
SELECTED = tuple(KINDS)
#: nodes whose bodies call `Attention`
CALLING = tuple(name for name, kind in KINDS.items() if kind.step is None or kind.reading is _EVERY)


def selected_body(
    name: str, budgets: tuple[str, ...], capped: bool = True, sliding: bool = True
) -> str:
    """The body of a node of `SELECTED` without the domain's line.

    Args:
        name: of the node.
        budgets: those that some node of the file has.
        capped: some node may have a softcap.
        sliding: the block of some node may have a window of its own.
    """
    kind = KINDS[name]
    if name == "EveryChannelsAttention" and not set(budgets) <= set(COUNTS):
        kind = replace(kind, several=_BY_LABEL, reading=_MASKED)
    lines = {
        "NAME": name,
        "ATTRIBUTES": ", ".join(f"{k}: {t}" for k, t in kind.attributes.items()),
        "INPUTS": ", ".join(kind.all_inputs),
        "OUTPUTS": ", ".join(kind.all_outputs),
        "ALWAYS": kind.always,
        "STEP": _EVERY_STEP if kind.step is None else kind.step + _GATHERED,
        "SEVERAL": kind.reading.replace("CHOSEN", kind.several),
    }
    body = _NODE
    for word, text in lines.items():
        body = body.replace(word, text)
    body = in_blocks(inner_caps(ranking(body, name, budgets, capped), capped), sliding)
    return finished(body, capped)
