"""Read the way out of a core: through reshapes to the output projection, if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reattend.passes.base import call, owned
from reattend.passes.evaluate import Evaluator, concrete_shape
from reattend.passes.find.joins import inverse_columns, projection_after, read_join
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.stored import weight_of
from reattend.passes.normalize.forms import aten, is_op, is_projection
from reattend.spec import Gate, Joined, Out

_LAYOUT = (
    aten.transpose, aten.permute, aten.view, aten.reshape, aten.clone, aten.contiguous,
    aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten, aten.to,
)  # fmt: skip


@dataclass
class FoundExit:
    """The last node of the block and, where it is a projection, its column map."""

    node: fx.Node
    joined: fx.Node
    out: Out | None
    join: Gate | Joined | None = None


def read_exit(
    gm: fx.GraphModule, core: fx.Node, hidden: fx.Node, given: dict[fx.Node, Any], owner: str
) -> FoundExit:
    """Follow a core to its output projection, through layout, a gate or the model's own steps.

    Where something else follows (two cores that meet, tokens that are regrouped), the block ends
    with its joined heads.
    """
    try:
        return _projected(gm, core, hidden, given, owner)
    except NotUnderstood:
        joined = _joined(gm, core)
        return FoundExit(joined, joined, None)


def _joined(gm: fx.GraphModule, core: fx.Node) -> fx.Node:
    """[B, N, H e], made right behind a core [B, H, N, e]; whoever reads the core reads it there."""
    readers = [u for u in core.users if not is_op(u, aten.sym_size)]
    heads, width = (int(core.meta["val"].shape[axis]) for axis in (1, 3))
    with gm.graph.inserting_after(core):
        turned = call(gm, aten.transpose.int, core, 1, 2)
    with gm.graph.inserting_after(turned):
        joined = call(gm, aten.flatten.using_ints, turned, 2, -1)
    with gm.graph.inserting_after(joined):
        apart = call(gm, aten.unflatten.int, joined, -1, [heads, width])
    with gm.graph.inserting_after(apart):
        back = call(gm, aten.transpose.int, apart, 1, 2)
    owned(back, core)
    for reader in readers:
        reader.replace_input_with(core, back)
    return joined


def _projected(
    gm: fx.GraphModule, core: fx.Node, hidden: fx.Node, given: dict[fx.Node, Any], owner: str
) -> FoundExit:
    """The exit of a block that ends in a projection, or right before something else.

    Raises:
        NotUnderstood: what follows is none of these.
    """
    node: fx.Node = core
    while True:
        users = [u for u in node.users if not is_op(u, aten.sym_size)]
        if len(users) != 1 or is_projection(users[0]) or not is_op(users[0], *_LAYOUT):
            break
        node = users[0]
    if len(users) == 1 and is_projection(users[0]):
        columns = _columns(gm, core, node, given)
        try:
            return FoundExit(users[0], node, _out(users[0], columns))
        except NotUnderstood:  # a computed weight: the block ends before it
            if columns == tuple(range(len(columns))):
                return FoundExit(node, node, None)
            raise
    after = projection_after(core)
    if after is not None:
        join, columns = read_join(gm, core, hidden, after, given, owner)
        joined = after.args[0]
        assert isinstance(joined, fx.Node)
        return FoundExit(after, joined, _out(after, columns), join)
    if len(users) != 1:
        raise NotUnderstood(f"the output of the core is used {len(users)} times")
    columns = _columns(gm, core, node, given)
    if columns != tuple(range(len(columns))):
        raise NotUnderstood(f"{users[0].name} stands between the core and its projection")
    return FoundExit(node, node, None)


def _out(projection: fx.Node, columns: tuple[int, ...]) -> Out:
    weight, transposed = weight_of(projection.args[1])
    bias = None
    if len(projection.args) > 2 and projection.args[2] is not None:
        bias = weight_of(projection.args[2])[0]
    features = int(projection.meta["val"].shape[-1])
    return Out(weight, bias, features, columns, transposed)


def _columns(
    gm: fx.GraphModule, core: fx.Node, joined: fx.Node, given: dict[fx.Node, Any]
) -> tuple[int, ...]:
    """columns[h * e + i] = column of the joined tensor that holds head h, dimension i."""
    shape = concrete_shape(core, given)
    _, heads, _, width = shape
    code = torch.arange(heads * width, dtype=torch.float64).reshape(1, heads, 1, width)
    coded = code.expand(*shape).contiguous()
    out = Evaluator(gm, promote=torch.float64).run([joined], {**given, core: coded})[0]
    if list(out.shape[:2]) != [shape[0], shape[2]]:
        raise NotUnderstood("tokens are regrouped between the core and its projection")
    return inverse_columns(out, heads * width)
