"""Streams whose beginning has no word of its own: carried along as a program.

From the hidden state to the first value from which the rest is understood (a map of rows, norms,
a rotation), the model's own operations stand where a projection usually does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from reattend.passes.evaluate import ancestors
from reattend.passes.find.programs import cut_out, then
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten, is_op, is_projection
from reattend.passes.normalize.ways import known
from reattend.program import Program
from reattend.spec import Opaque

#: values tried as the end of the program
_TRIES = 40


def common_input(core_input: fx.Node) -> fx.Node | None:
    """The one value that every nearest projection behind a core input is computed from."""
    seen = ancestors([core_input], stop=is_projection)
    found = {n.args[0] for n in seen if is_projection(n)}
    for node in found:
        if isinstance(node, fx.Node):
            rest = [o for o in found if o is not node]
            if all(node in ancestors([o]) for o in rest if isinstance(o, fx.Node)):
                return _unfolded(node)
    return None


def _unfolded(node: fx.Node) -> fx.Node:
    """[B, N, D] where a value is its fold [B N, D], as routers of experts read it."""
    while is_op(node, aten.reshape, aten.view, aten.flatten) and node.meta["val"].dim() == 2:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if str(source.meta["val"].shape[-1]) != str(node.meta["val"].shape[-1]):
            break
        node = source
    return node


@dataclass(frozen=True)
class Start:
    """Where the part of a stream begins that is read step by step.

    Attributes:
        node: its value, [B, N, p], [B, N, h, d] or, `heads_first`, [B, h, N, d].
        parts: the values it holds side by side; itself where it is one.
        heads_first: see `node`.
    """

    node: fx.Node
    parts: tuple[fx.Node, ...]
    heads_first: bool = False


def starts(core_input: fx.Node, hidden: fx.Node) -> Iterator[Start]:
    """Values that all of the stream passes through, from the hidden state on.

    The nearest projections side by side come first, where they are several: what follows them is
    then a map of rows and a rotation, also where parts turn before they meet (latent attention).
    """
    side_by_side = _together(core_input)
    if side_by_side is not None:
        yield side_by_side
    for node, heads_first in _passages(core_input, hidden):
        yield Start(node, (node,), heads_first)


def _together(core_input: fx.Node) -> Start | None:
    """The nearest projections behind a core input as one value; None where there is only one."""
    behind = ancestors([core_input], stop=is_projection)
    parts = sorted(n for n in behind if is_projection(n))
    if len(parts) < 2 or any(n.meta["val"].dim() != 3 and not unit_axis(n) for n in parts):
        return None
    if len({_tokens(n) for n in parts}) > 1:
        return None
    graph, stack = core_input.graph, parts[-1].meta.get("nn_module_stack", {})
    with graph.inserting_before(parts[-1].next):
        flat = [_without_axis(graph, n) for n in parts]
        node = graph.call_function(aten.cat.default, (flat, -1))
    value: Tensor = flat[0].meta["val"]
    width = sum(int(n.meta["val"].shape[-1]) for n in flat)
    node.meta["val"] = value.new_empty((*value.shape[:-1], width))
    for made in (*flat, node):
        made.meta.setdefault("nn_module_stack", stack)
    return Start(node, tuple(parts))


def unit_axis(node: fx.Node) -> int:
    """The axis of size 1 in [B, 1, N, p] or [B, N, 1, p]; 0 where there is none."""
    shape = node.meta["val"].shape
    return next((i for i in (1, 2) if len(shape) == 4 and str(shape[i]) == "1"), 0)


def _tokens(node: fx.Node) -> tuple[str, ...]:
    """Batch and tokens of [B, N, p], with or without an axis of size 1."""
    shape, axis = [str(size) for size in node.meta["val"].shape], unit_axis(node)
    return tuple(size for i, size in enumerate(shape[:-1]) if not axis or i != axis)


def _without_axis(graph: fx.Graph, node: fx.Node) -> fx.Node:
    axis = unit_axis(node)
    if not axis:
        return node
    flat = graph.call_function(aten.squeeze.dim, (node, axis))
    flat.meta["val"] = node.meta["val"].squeeze(axis)
    return flat


def _passages(core_input: fx.Node, hidden: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Values that all of the stream passes through, and whether heads come before tokens."""
    behind = ancestors([core_input], stop=lambda n: n is hidden)
    wanted = {n for n in ancestors([core_input], stop=is_projection) if is_projection(n)}
    shape = hidden.meta["val"].shape
    if len(shape) != 3:
        return
    tried = 0
    for node in core_input.graph.nodes:
        value = node.meta.get("val")
        if node not in behind or node is hidden or not isinstance(value, Tensor):
            continue
        if not value.is_floating_point() or value.dim() < 3:
            continue
        if str(value.shape[0]) != str(shape[0]):
            continue
        tokens = [i for i in (1, 2) if value.dim() > i and str(value.shape[i]) == str(shape[1])]
        if value.dim() not in (3, 4) or not tokens or (value.dim() == 3 and tokens[0] != 1):
            continue
        if not isinstance(value.shape[-1], int):
            continue
        if not wanted <= ancestors([node], stop=lambda n: n is hidden):
            continue
        if hidden in ancestors([core_input], stop=lambda n, c=node: n is c):  # type: ignore[misc]
            continue
        yield node, tokens[0] == 2
        tried += 1
        if tried == _TRIES:
            return


def endings(core_input: fx.Node) -> Iterator[Start]:
    """Values with heads that all of the stream passes through, whatever it is computed from."""
    behind = ancestors([core_input], stop=is_projection)
    wanted = {n for n in behind if is_projection(n)}
    tried = 0
    for node in core_input.graph.nodes if wanted else ():
        value = node.meta.get("val")
        if node not in behind or not isinstance(value, Tensor) or value.dim() != 4:
            continue
        fixed = [isinstance(size, int) for size in value.shape]
        if not value.is_floating_point() or not fixed[3] or not (fixed[1] or fixed[2]):
            continue
        if not wanted <= ancestors([node], stop=is_projection):
            continue
        if wanted & ancestors([core_input], stop=lambda n, c=node: n is c):  # type: ignore[misc]
            continue
        yield Start(node, (node,), fixed[1])
        tried += 1
        if tried == _TRIES:
            return


def uncut(heads: int, rows: tuple[int, ...]) -> Opaque:
    """Stands for a program until it is known what it reads."""
    program = Program(inputs=(), weights={}, steps=(), output="")
    return Opaque(program, (), heads, len(rows) // heads, rows)


def opaque_step(
    gm: fx.GraphModule,
    inputs: dict[fx.Node, str],
    end: fx.Node,
    heads_first: bool,
    rows: tuple[int, tuple[int, ...]],
) -> Opaque:
    """The program from `inputs` to `end` as [B, N, p], in place of a projection.

    Args:
        gm: normalised graph.
        inputs: where it begins, the source first.
        end: where it ends, [B, N, p], [B, N, h, d] or, `heads_first`, [B, h, N, d].
        heads_first: see `end`.
        rows: heads, and for each head and dimension the number of [B, N, p] it reads.

    Raises:
        NotUnderstood: it depends on anything else.
    """
    part = cut_out(gm, end, inputs, "the way from the hidden state to the core")
    program = part.program
    if heads_first:
        program = then(program, "aten.transpose.int", 1, 2)
    if end.meta["val"].dim() == 4:
        program = then(program, "aten.flatten.using_ints", 2)
    heads, flat = rows
    if len(flat) % heads:
        raise NotUnderstood("heads of unequal width")
    source = next(iter(inputs)).meta["val"].shape
    shape = end.meta["val"].shape
    tokens = [known(shape[0]), known(shape[2 if heads_first else 1])]
    moves = tokens != [known(size) for size in source[:2]]
    return Opaque(program, part.sources, heads, len(flat) // heads, flat, regroups=moves)
