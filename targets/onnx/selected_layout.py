"""Which node a class of heads with a selector becomes, its attributes, and what it keeps."""

from __future__ import annotations

from math import log
from typing import Any

from reattend.errors import RefusedError
from reattend.mixers.config import CoreConfig, RotaryConfig
from reattend.mixers.selecting.segments import STEEP
from reattend.patterns.learned import Gate, Segments, Values
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selector import Budgeted, Selector
from reattend.patterns.selectors import Blocks, Channels, Recorded, VerticalSlash
from reattend.targets.onnx.refusals import STAY_DENSE
from reattend.targets.onnx.selected_choice import BUDGETS
from reattend.targets.onnx.sparse_form import Extra, SparseForm

#: what the nodes know of a pattern and of each selector; a field added later is refused by name
_PATTERN = {"select", "sinks", "window"}
_BUDGET = {"kind", *BUDGETS}
_KNOWN: dict[type[Selector], set[str]] = {
    Blocks: {*_BUDGET, "block", "queries", "key", "first", "last"},
    Gate: {*_BUDGET, "block", "gate_dim"},
    Channels: {*_BUDGET, "share", "phase"},
    Values: {"kind", "topk", "ratio"},
    Segments: {
        "kind", "topk", "ratio", "window", "apart", "theta", "longest", "local", "hidden",
    },
    Recorded: {"kind", "at", "topk", "layer"},
    VerticalSlash: {
        "kind", "columns", "slashes", "last_queries", "first_columns", "last_slashes",
    },
}  # fmt: skip
#: what is saved, by the calls in which a selector acts
_SAVES = {
    "both": "reads: the rows that are chosen, in prompts those that one of 64 neighbours chose; "
    "ranking reads every label",
    "decode": "reads while decoding: the rows that are chosen; prompts are dense",
}
#: nodes whose blocks of keys meet the queries that chose them
_ROUTED = ("BlocksAttention", "AnchoredBlocksAttention", "AttendedBlocksAttention", "GateAttention")
_OTHER = {
    "PooledBlocksAttention": "reads of prompts: the rows that blocks of queries chose; decoding is "
    "dense",
    "VerticalSlashAttention": "reads of prompts: the rows that lines of a head pass through; "
    "decoding is dense",
    "ValuesAttention": "reads: the rows that are chosen, in prompts those that a region's queries "
    "chose",
    **dict.fromkeys(
        _ROUTED,
        "reads: the rows that are chosen, in prompts by queries that chose a "
        "block together, unless sinks or a window are seen beside",
    ),
    "SegmentsAttention": "reads: of values the rows that are chosen, in prompts of both those that "
    "one of 64 neighbours chose; ranking chunks reads every key, and on a CPU decoding takes "
    "longer than a dense layer",
}
#: tokens of the longest text that an export is checked with on account of a selector; torch attends
#: to it densely, on one CPU
LONGEST = 4096
_NO_MEMORY = "no memory, because any row may be chosen again"


def selected_form(path: str, pattern: HeadPattern, core: CoreConfig) -> SparseForm:
    """The node of one class.

    Args:
        path: of the layer, for errors.
        pattern: with a selector.
        core: of the block.

    Raises:
        RefusedError: no node chooses so.
    """
    select = pattern.select
    assert select is not None
    _check_known(path, pattern)
    name, tokens = node_name(select), min(_beyond(select), LONGEST)
    if name == "Attention":
        return SparseForm(name, saves="nothing: the layers before the first that notes are dense")
    if name == "NotingAttention":
        saves = "nothing: it reads every row, and notes which ones later layers read"
    else:
        told = _OTHER[name] if name in _OTHER else _SAVES[select.acts]
        saves = f"{told}; {_NO_MEMORY}"
    return SparseForm(name, saves=saves, extra=_extra(select, core), tokens=tokens)


def node_name(select: Selector) -> str:
    """The node that chooses so."""
    if isinstance(select, Gate):
        return "GateAttention"
    if isinstance(select, Blocks):
        if select.queries == "pooled":
            return "PooledBlocksAttention"
        if select.key == "attended":
            return "AttendedBlocksAttention"
        alone = not select.first and select.last == 1
        return "BlocksAttention" if alone else "AnchoredBlocksAttention"
    if isinstance(select, Values):
        return "ValuesAttention"
    if isinstance(select, Segments):
        return "SegmentsAttention"
    if isinstance(select, Channels):
        return "ChannelsAttention" if select.phase == "decode" else "EveryChannelsAttention"
    if isinstance(select, Recorded):
        if select.layer in select.at:
            return "NotingAttention"
        return "Attention" if select.source is None else "NotedAttention"
    return "VerticalSlashAttention"


def _extra(select: Selector, core: CoreConfig) -> tuple[Extra, ...]:
    if isinstance(select, Gate):
        return (Extra("summary", select.gate_dim, select.block),)
    if isinstance(select, Blocks) and select.key == "attended":
        width = core.qk_head_dim * core.heads // core.kv_heads
        return (
            Extra("summary", width, select.block),
            Extra("recent", width, rows=select.block),
        )
    if isinstance(select, Blocks) and select.queries == "each":
        return (Extra("summary", core.qk_head_dim, select.block),)
    if isinstance(select, Channels):
        return (Extra("label", select.width(core)),)
    if isinstance(select, Values):
        return (Extra("score", 1),)
    if isinstance(select, Segments):
        return (Extra("logit", 1),)
    return ()


def attributes(pattern: HeadPattern, rotary: RotaryConfig | None = None) -> dict[str, Any]:
    """What a node says of its pattern; all of it, as `ReferenceEvaluator` fills in no defaults.

    Args:
        pattern: of a class of heads.
        rotary: what turns the block's queries and keys, for nodes that turn them back.
    """
    select = pattern.select
    found: dict[str, Any] = {"sinks": pattern.sinks, "window": pattern.window}
    if isinstance(select, Budgeted):
        given = {name: getattr(select, name) for name in BUDGETS}
        found |= {k: BUDGETS[k] if v is None else v for k, v in given.items()}
    if isinstance(select, Blocks | Gate):
        found["block"] = select.block
        if node_name(select) in ("AnchoredBlocksAttention", "AttendedBlocksAttention"):
            found |= select.model_dump(include={"first", "last"})
        if node_name(select) == "AttendedBlocksAttention":
            found["inv_freq"] = list(rotary.inv_freq) if rotary else [0.0]
    elif isinstance(select, Segments):
        found = {k: v for k, v in found.items() if k not in ("topp", "threshold")} | {
            "gap_window": select.window, "gap_least": STEEP * log(select.theta),
            "near": [max(1, select.apart)], "apart": select.apart, "delay": select.delay,
            "longest": select.longest, "local": select.local,
            "window": max(pattern.window, select.local),
        }  # fmt: skip
    elif isinstance(select, VerticalSlash):
        found |= {k: v for k, v in select.model_dump().items() if k != "kind"}
    elif isinstance(select, Recorded) and node_name(select) == "NotingAttention":
        found["topk"] = select.topk
    return found


def _beyond(select: Selector) -> int:
    """Tokens of which about half are left out."""
    if isinstance(select, VerticalSlash):
        return 2 * (select.columns + select.slashes)
    if isinstance(select, Recorded):
        return 2 * select.topk
    unit = select.block if isinstance(select, Blocks | Gate) else 1
    if isinstance(select, Budgeted) and select.topk is not None:
        return 2 * select.topk * unit
    return 8 * max(unit, 8)


def _check_known(path: str, pattern: HeadPattern) -> None:
    """Refuse what no node knows.

    Raises:
        RefusedError: with its name.
    """
    select = pattern.select
    assert select is not None
    given = pattern.model_dump(exclude_defaults=True)
    unknown = [f"pattern.{name}" for name in given if name not in _PATTERN]
    known = _KNOWN.get(type(select))
    if known is None:
        unknown.append(f"select: {select.kind}")
    else:
        told = select.model_dump(exclude_defaults=True)
        if node_name(select) == "PooledBlocksAttention":
            known = known - {"first", "last"}
        unknown += [f"select.{name}" for name in told if name not in known]
    if unknown:
        raise RefusedError(
            "this sparse layer cannot be exported to ONNX",
            where=path,
            why=f"no node of the file knows {', '.join(sorted(set(unknown)))}",
            next_step=STAY_DENSE,
        )
