"""Read the way out of a core: through reshapes to the output projection, if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, concrete_shape
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.streams import weight_of
from reattend.passes.normalize.forms import aten, is_op, is_projection
from reattend.spec import Out

_LAYOUT = (
    aten.transpose, aten.permute, aten.view, aten.reshape, aten.clone, aten.contiguous,
    aten._unsafe_view, aten.unsqueeze, aten.squeeze, aten.flatten, aten.to,
)  # fmt: skip


@dataclass
class FoundExit:
    """The last node of the block and, where it is a projection, its column map."""

    node: fx.Node
    joined: fx.Node
    out: Out | None


def read_exit(gm: fx.GraphModule, core: fx.Node, given: dict[fx.Node, Any]) -> FoundExit:
    """Follow the single user chain of a core.

    Raises:
        NotUnderstood: what follows is neither layout nor a projection (a gate, a second core).
    """
    node = core
    while True:
        users = [u for u in node.users if not is_op(u, aten.sym_size)]
        if len(users) != 1:
            raise NotUnderstood(f"the output of the core is used {len(users)} times")
        if is_projection(users[0]) or not is_op(users[0], *_LAYOUT):
            break
        node = users[0]
    after = users[0]
    columns = _columns(gm, core, node, given)
    if not is_projection(after):
        if columns != tuple(range(len(columns))):
            raise NotUnderstood(f"{after.name} stands between the core and its projection")
        return FoundExit(node, node, None)
    weight, transposed = weight_of(after.args[1])
    bias = None
    if len(after.args) > 2 and after.args[2] is not None:
        bias = weight_of(after.args[2])[0]
    features = int(after.meta["val"].shape[-1])
    return FoundExit(after, node, Out(weight, bias, features, columns, transposed))


def _columns(
    gm: fx.GraphModule, core: fx.Node, joined: fx.Node, given: dict[fx.Node, Any]
) -> tuple[int, ...]:
    """columns[h * e + i] = column of the joined tensor that holds head h, dimension i."""
    shape = concrete_shape(core, given)
    _, heads, _, width = shape
    code = torch.arange(heads * width, dtype=torch.float64).reshape(1, heads, 1, width)
    coded: Tensor = code.expand(*shape).contiguous()
    out = Evaluator(gm, promote=torch.float64).run([joined], {**given, core: coded})[0]
    if out.dim() != 3 or out.shape[-1] != heads * width:
        raise NotUnderstood(f"the core's heads are joined as {tuple(out.shape)}")
    order = out[0, 0].round().long()
    if not bool((out == order.to(out.dtype)).all()):
        raise NotUnderstood("tokens are regrouped between the core and its projection")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return tuple(inverse.tolist())
