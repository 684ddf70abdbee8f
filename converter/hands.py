"""Where an owner leaves keys and values for later blocks, found by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor, fx

from reattend.capture import Capture
from reattend.install.binding import equal, leaves, read
from reattend.install.pieces import HandedOn, Path
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.passes.find.streams import read_stream
from reattend.weights import stream_rows


def bind_hands(
    captured: Capture,
    item: Found,
    path: str,
    arguments: dict[str, Any],
    values: dict[fx.Node, Any],
) -> tuple[HandedOn, ...]:
    """What a block hands on, and where.

    Args:
        captured: the graph.
        item: the block.
        path: of its owner.
        arguments: of the watched call, as they are after it.
        values: of what is handed on, in that call.

    Raises:
        NotUnderstood: it leaves by another way, or in another form than the block's own.
    """
    found: dict[tuple[Path, Any], dict[Any, tuple[str, int, tuple[int, ...]]]] = {}
    taken: set[Path] = set()  # keys and values may be equal
    for name, node in item.region.handed.items():
        at = _left_at(arguments, values[node], taken)
        if at is None:
            raise NotUnderstood(f"{path} hands {node.name} on by another way than an argument")
        columns = _columns(captured, item, name, node)
        entry = (name, int(node.meta["val"].shape[1]), columns)
        found.setdefault((at[0], at[1]), {})[at[2]] = entry
    return tuple(_hand(path, read(arguments, at), at, key, e) for (at, key), e in found.items())


def _left_at(
    arguments: dict[str, Any], value: Tensor, taken: set[Path]
) -> tuple[Path, Any, int | None] | None:
    """(the mapping, key, place in a tuple there) of a value that is not taken."""
    for at, leaf in leaves(arguments):
        if at in taken or not isinstance(leaf, Tensor) or not equal(leaf, value):
            continue
        taken.add(at)
        for cut, place in ((1, None), (2, at[-1])):
            if len(at) > cut and isinstance(read(arguments, at[:-cut]), Mapping):
                return at[:-cut], at[-cut], cast("int | None", place)
    return None


def _hand(
    path: str,
    container: Any,
    at: Path,
    key: Any,
    entries: dict[Any, tuple[str, int, tuple[int, ...]]],
) -> HandedOn:
    alone = set(entries) == {None}
    order = [None] if alone else range(len(container[key]))
    if set(order) != set(entries):
        raise NotUnderstood(f"{path} hands on more than its keys and values")
    streams = tuple(cast("Literal['k', 'v']", entries[i][0]) for i in order)
    return HandedOn(
        container=at, key=key, streams=streams, alone=alone,
        heads=tuple(entries[i][1] for i in order), columns=tuple(entries[i][2] for i in order),
    )  # fmt: skip


def _columns(captured: Capture, item: Found, name: str, node: fx.Node) -> tuple[int, ...]:
    """Where in the mixer's keys or values each number of what is handed on stands."""
    own = item.region.streams[name]
    here = read_stream(captured.gm, node, captured.placeholders())
    if here.projection is not own.projection or here.steps[1:] != own.steps[1:]:
        raise NotUnderstood(f"what becomes of {name} behind {node.name} is not handed on")
    spec_rows = stream_rows(item.spec, cast("Literal['k', 'v']", name))
    stored = item.spec.k.proj.rows if name == "k" else item.spec.v.proj.rows
    as_stored = dict(zip(own.steps[0].rows, stored, strict=True))  # type: ignore[union-attr]
    rows = [as_stored[r] for r in here.steps[0].rows]  # type: ignore[union-attr]
    return tuple(spec_rows.index(r) for r in rows)
