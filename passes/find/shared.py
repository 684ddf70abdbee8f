"""Keys and values that several blocks read: made by one, handed to the others (Gemma 3n).

Cross-layer attention, Brandon et al., arXiv 2405.12981. The reader's module is called with finished
keys and values; the maker's leaves them for others beside its result.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from reattend.passes.base import path_of
from reattend.passes.evaluate import ancestors
from reattend.passes.find.opaque import Start, uncut
from reattend.passes.find.owners import from_outside, owner_of
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.steps import FoundStream, read_from
from reattend.passes.normalize.forms import aten, attention, is_op, is_projection


def read_shared(
    gm: fx.GraphModule, core: fx.Node, which: int, given: dict[fx.Node, Any]
) -> FoundStream | None:
    """A core's keys (1) or values (2) that are those of an earlier core; None if they are its own.

    Args:
        gm: normalised graph.
        core: the attention node.
        which: the argument.
        given: values of the graph's placeholders.
    """
    end: Any = core.args[which]
    queries = [n for n in ancestors([core.args[0]], stop=is_projection) if is_projection(n)]
    owner = owner_of([*queries, core])
    enters = from_outside(end, owner)
    if not owner or len(enters) != 1 or enters[0].meta["val"].dim() != 4:
        return None
    maker = _first_reader(enters[0], core, which)
    if maker is None:
        return None
    start = Start(enters[0], (enters[0],), isinstance(enters[0].meta["val"].shape[1], int))
    try:
        found = read_from(gm, end, given, start, uncut)
    except (NotUnderstood, RuntimeError, IndexError):
        return None
    if found.rotation is not None or len(found.steps) > 1:
        return None
    found.hidden, found.carried = enters[0], True
    found.site = owner_of([enters[0], maker])
    return found


def _first_reader(node: fx.Node, core: fx.Node, which: int) -> fx.Node | None:
    """The earlier core in whose module `node` is made and that reads it as the same argument."""
    for other in node.graph.nodes:
        if other is core:
            return None
        if is_op(other, attention) and path_of(other) == path_of(node):
            end: Any = other.args[which]
            if node in ancestors([end], stop=is_projection):
                return other
    return None


def handed_on(core: fx.Node, streams: dict[str, FoundStream], owner: str) -> dict[str, fx.Node]:
    """Keys and values of a block that others read too, `k` or `v` -> the node.

    Raises:
        NotUnderstood: they are read in several forms, or in one that the block itself does not.
    """
    own = {name: s for name, s in streams.items() if not s.site}
    starts = {s.projection for s in own.values()}
    found: dict[str, fx.Node] = {}
    for node in next(iter(starts)).graph.nodes if owner else ():
        if not _inside(node, owner) or not _read_elsewhere(node, owner):
            continue
        behind = ancestors([node], stop=lambda n: n in starts)
        if not starts & behind or core in behind:
            continue  # a rotary table; the block's result
        name = next((n for n in own if n in "kv" and node in own[n].nodes), None)
        if name is None or name in found:
            raise NotUnderstood(f"other blocks read {node.name}, which is not its keys or values")
        found[name] = node
    return found


def _read_elsewhere(node: fx.Node, owner: str) -> bool:
    """Whether another core's keys or values are made of a node, and not through a projection."""
    outside = {
        u
        for u in node.users
        if not _inside(u, owner) and not is_op(u, aten.sym_size) and not is_projection(u)
    }
    others = [
        n for n in node.graph.nodes if outside and is_op(n, attention) and not _inside(n, owner)
    ]
    return any(outside & ancestors(n.args[1:3], stop=is_projection) for n in others)


def _inside(node: fx.Node, owner: str) -> bool:
    return f"{path_of(node)}.".startswith(f"{owner}.")
