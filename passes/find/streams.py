"""Read one stream (q, k or v) of a core: from the core back to its projection, or beyond."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from reattend.passes.evaluate import ancestors
from reattend.passes.find.opaque import (
    Start,
    common_input,
    endings,
    opaque_step,
    starts,
    uncut,
    unit_axis,
)
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.steps import FoundStream, read_from
from reattend.passes.find.stored import projection_rows
from reattend.passes.normalize.forms import is_projection

__all__ = ["FoundStream", "find_projection", "read_carried", "read_stream"]


def find_projection(core_input: fx.Node) -> fx.Node:
    """The one projection behind a core input."""
    seen = ancestors([core_input], stop=is_projection)
    found = [n for n in seen if is_projection(n)]
    if len(found) != 1:
        where = "no projection" if not found else f"{len(found)} projections"
        raise NotUnderstood(f"{where} behind {core_input.name} (exactly one is understood)")
    return found[0]


def read_stream(
    gm: fx.GraphModule, core_input: fx.Node, given: dict[fx.Node, Any], grows: bool = True
) -> FoundStream:
    """Read the stream that ends in `core_input` ([B, H, N, d]).

    Args:
        gm: normalised graph.
        core_input: argument of the core.
        given: values of the graph's placeholders.
        grows: a factor by position may be a step of its own; else it is carried.

    Raises:
        NotUnderstood: with the first thing that is not of a known form.
    """
    try:
        projection = find_projection(core_input)
        start = Start(projection, (projection,), unit_axis(projection) == 1)
        return read_from(gm, core_input, given, start, projection_rows(gm, projection), grows)
    except NotUnderstood as first:
        found = _read_opaque(gm, core_input, given, grows) or read_carried(gm, core_input, given)
        if found is None:
            raise first
        return found


def _read_opaque(
    gm: fx.GraphModule, core_input: fx.Node, given: dict[fx.Node, Any], grows: bool
) -> FoundStream | None:
    """The stream with its beginning as a program; the earliest end from which the rest is read."""
    hidden = common_input(core_input)
    if hidden is None:
        return None
    for start in starts(core_input, hidden):
        make = lambda heads, rows, s=start: opaque_step(  # noqa: E731
            gm, {hidden: "x"}, s.node, s.heads_first, (heads, rows)
        )
        try:
            found = read_from(gm, core_input, given, start, make, grows)
        except (NotUnderstood, RuntimeError, IndexError):
            continue
        found.hidden = hidden
        return found
    return None


def read_carried(
    gm: fx.GraphModule, core_input: fx.Node, given: dict[fx.Node, Any]
) -> FoundStream | None:
    """The stream as the model's own steps, rotation and all; None where it has no projection.

    It may be computed from several tensors (keys of a decoder's tokens and of an encoder's, side
    by side): which they are its `sources` say, and only then its program is cut.
    """
    for start in endings(core_input):
        try:
            found = read_from(gm, core_input, given, start, uncut)
        except (NotUnderstood, RuntimeError, IndexError):
            continue
        if found.rotation is None and len(found.steps) == 1:
            return replace(found, hidden=start.node, carried=True)
    return None
