"""Which node a class of heads with a selector becomes, its attributes, and what it keeps."""

from __future__ import annotations

from typing import Any

from reattend.errors import RefusedError
from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selector import Budgeted, Selector
from reattend.patterns.selectors import Blocks, Gate
from reattend.targets.onnx.selected_choice import BUDGETS
from reattend.targets.onnx.sparse_form import Extra, SparseForm

#: what the nodes know of a pattern and of each selector; a field added later is refused by name
_PATTERN = {"select", "sinks", "window"}
_BUDGET = {"kind", *BUDGETS}
_KNOWN: dict[type[Selector], set[str]] = {
    Blocks: {*_BUDGET, "block", "queries"},
    Gate: {*_BUDGET, "block", "gate_dim"},
}
_READS = "reads while decoding: the rows that are chosen; prompts are read under a mask"
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
    _check_known(path, pattern)
    assert isinstance(select, Blocks | Gate)
    width = select.gate_dim if isinstance(select, Gate) else core.qk_head_dim
    return SparseForm(
        node_name(select),
        saves=f"{_READS}; {_NO_MEMORY}",
        extra=Extra("summary", width, select.block),
        tokens=_beyond(select, select.block),
    )


def node_name(select: Selector) -> str:
    """The node that chooses so."""
    return "GateAttention" if isinstance(select, Gate) else "BlocksAttention"


def attributes(pattern: HeadPattern) -> dict[str, Any]:
    """What a node says of its pattern; all of it, as `ReferenceEvaluator` fills in no defaults."""
    select = pattern.select
    found: dict[str, Any] = {"sinks": pattern.sinks, "window": pattern.window}
    if isinstance(select, Budgeted):
        given = {name: getattr(select, name) for name in BUDGETS}
        found |= {k: BUDGETS[k] if v is None else v for k, v in given.items()}
    if isinstance(select, Blocks | Gate):
        found["block"] = select.block
    return found


def _beyond(select: Budgeted, unit: int) -> int:
    """Tokens of which about half are left out."""
    if select.topk is not None:
        return 2 * select.topk * unit
    return 8 * unit


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
        unknown += [f"select.{name}" for name in told if name not in known]
    if isinstance(select, Blocks) and select.queries != "each":
        unknown.append("select: blocks with `queries: pooled`")
    if unknown:
        raise RefusedError(
            "this sparse layer cannot be exported to ONNX",
            where=path,
            why=f"no node of the file knows {', '.join(sorted(set(unknown)))}",
            next_step="keep it dense for this target (`to: dense`)",
        )
