"""Read what stands between a core and its output projection: a gate, or the model's own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors, concrete_shape
from reattend.passes.find.owners import from_outside
from reattend.passes.find.programs import cut_out
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.stored import weight_of
from reattend.passes.normalize.forms import aten, attention, is_op, is_projection
from reattend.spec import Gate, Joined

#: operations between core and projection that are looked at
_LIMIT = 60
_ACTS = {aten.sigmoid: "sigmoid", aten.silu: "silu", aten.tanh: "tanh", aten.relu: "relu"}
Act = Literal["sigmoid", "silu", "tanh", "relu", "identity"]


def projection_after(core: fx.Node) -> fx.Node | None:
    """The one projection that all ways from the core lead to, None if there is none."""
    region, todo, found = {core}, [core], set()
    while todo:
        for user in todo.pop().users:
            if is_op(user, aten.sym_size) or user in region:
                continue
            if is_projection(user):
                found.add(user)
                continue
            if user.op != "call_function" or is_op(user, attention) or len(region) > _LIMIT:
                return None
            region.add(user)
            todo.append(user)
    if len(found) != 1:
        return None
    after = found.pop()
    return after if after.args[0] in region else None


def read_join(
    gm: fx.GraphModule,
    core: fx.Node,
    hidden: fx.Node,
    after: fx.Node,
    given: dict[fx.Node, Any],
    owner: str,
) -> tuple[Gate | Joined, tuple[int, ...]]:
    """What happens between `core` and the projection `after`, and the columns `after` reads.

    Args:
        gm: normalised graph.
        core: the attention node, [B, H, N, e].
        hidden: where the queries come from, [B, N, D].
        after: the output projection.
        given: placeholder values.
        owner: path of the module that the block lies in.

    Raises:
        NotUnderstood: it depends on other values than the core's output and the hidden state.
    """
    joined = after.args[0]
    assert isinstance(joined, fx.Node)
    shape = concrete_shape(joined, given)
    if len(shape) != 3 or shape[:2] != concrete_shape(hidden, given)[:2]:
        raise NotUnderstood(f"the core's heads are joined as {tuple(shape)}")
    found = _gate(gm, core, hidden, joined, given)
    if found is not None:
        return found
    beside = from_outside(joined, owner, (core, hidden))
    if beside:
        raise NotUnderstood(f"what follows the core reads {beside[0].name}")
    return own_join(gm, core, hidden, joined), tuple(range(shape[-1]))


def own_join(gm: fx.GraphModule, core: fx.Node, hidden: fx.Node, joined: fx.Node) -> Joined:
    """The model's own steps from `core` [B, H, N, e] to `joined` [B, N, width].

    Raises:
        NotUnderstood: they read more than the core's output and the hidden state.
    """
    part = cut_out(gm, joined, {core: "y", hidden: "x"}, "what follows the core")
    return Joined(part.program, part.sources, int(joined.meta["val"].shape[-1]))


def _gate(
    gm: fx.GraphModule,
    core: fx.Node,
    hidden: fx.Node,
    joined: fx.Node,
    given: dict[fx.Node, Any],
) -> tuple[Gate, tuple[int, ...]] | None:
    """y * act(projection(x)) and layout around it; None if it is something else."""
    own = {n for n in ancestors([joined], stop=lambda n: n is core) if core in ancestors([n])}
    products = [n for n in own if is_op(n, aten.mul) and n is not core]
    if len(products) != 1:
        return None
    product = products[0]
    sides = [a for a in product.args[:2] if isinstance(a, fx.Node)]
    gates = [a for a in sides if a not in own]
    if len(sides) != 2 or len(gates) != 1:
        return None
    behind = ancestors([gates[0]], stop=is_projection)
    projections = [n for n in behind if is_projection(n)]
    if len(projections) != 1 or projections[0].args[0] is not hidden:
        return None
    acts = [n for n in behind if is_op(n, *_ACTS)]
    if len(acts) > 1:
        return None
    same: Callable[..., Any] = lambda x, *_a, **_k: x  # noqa: E731
    first = product.args[0] is gates[0]
    pick: Callable[..., Any] = lambda a, b: a if first else b  # noqa: E731
    other: Callable[..., Any] = lambda a, b: b if first else a  # noqa: E731
    y_shape = concrete_shape(core, given)
    try:
        columns = _columns(gm, core, joined, gates[0], y_shape, {product: other}, given)
        run = Evaluator(
            gm,
            promote=torch.float64,
            replace={**dict.fromkeys(acts, same), product: _broadcast(pick)},
        )
        ones = {**given, core: torch.ones(y_shape, dtype=torch.float64)}
        rows = _rows(run, projections[0], joined, ones)
    except (NotUnderstood, RuntimeError, KeyError, IndexError):
        return None
    per_column = [rows[c] for c in columns]
    heads, width = y_shape[1], y_shape[3]
    table = torch.tensor(per_column).reshape(heads, width)
    per_head = width > 1 and bool((table == table[:, :1]).all())
    flat = table[:, 0] if per_head else table.flatten()
    weight, transposed = weight_of(projections[0].args[1])
    arguments = [*projections[0].args, None]
    bias = weight_of(arguments[2])[0] if arguments[2] is not None else None
    packet = getattr(acts[0].target, "overloadpacket", None) if acts else None
    act = cast("Act", _ACTS[packet] if packet is not None else "identity")
    return Gate(weight, bias, act, per_head, tuple(flat.tolist()), transposed), columns


def _columns(
    gm: fx.GraphModule,
    core: fx.Node,
    joined: fx.Node,
    gate: fx.Node,
    shape: list[int],
    replace: dict[fx.Node, Callable[..., Any]],
    given: dict[fx.Node, Any],
) -> tuple[int, ...]:
    """columns[h * e + i]: where head h, dimension i stands in the joined tensor, gate left out."""
    _, heads, _, width = shape
    code = torch.arange(heads * width, dtype=torch.float64).reshape(1, heads, 1, width)
    y = code.expand(*shape).contiguous()
    ones = torch.ones(concrete_shape(gate, given), dtype=torch.float64)
    run = Evaluator(gm, promote=torch.float64, replace=replace)
    return inverse_columns(run.run([joined], {**given, core: y, gate: ones})[0], heads * width)


def inverse_columns(out: Tensor, width: int) -> tuple[int, ...]:
    """From a joined tensor of codes to the column of every code.

    Raises:
        NotUnderstood: it is no permutation, the same for every token.
    """
    if out.dim() != 3 or out.shape[-1] != width:
        raise NotUnderstood(f"the core's heads are joined as {tuple(out.shape)}")
    order = out[0, 0].round().long()
    if not bool((out == order.to(out.dtype)).all()):
        raise NotUnderstood("tokens are regrouped between the core and its projection")
    if sorted(order.tolist()) != list(range(width)):
        raise NotUnderstood("the core's output is changed before its projection")
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return tuple(inverse.tolist())


def _rows(
    run: Evaluator, projection: fx.Node, joined: fx.Node, given: dict[fx.Node, Any]
) -> list[int]:
    """The gate row behind every column of the joined tensor."""
    shape = concrete_shape(projection, given)
    code = torch.arange(1.0, shape[-1] + 1, dtype=torch.float64).expand(shape).clone()
    out = run.run([joined], {**given, projection: code})[0]
    found = out[0, 0].round()
    rows = [int(r) - 1 for r in found.tolist()]
    other = NotUnderstood("the gate is not a map of its projection's rows")
    if not bool((out == found).all()) or min(rows) < 0 or max(rows) >= shape[-1]:
        raise other
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    again = run.run([joined], {**given, projection: noise})[0]
    if not bool((again == noise[..., rows]).all()):
        raise other
    return rows


def _broadcast(pick: Callable[..., Any]) -> Callable[..., Any]:
    """One factor of a product, in the product's shape."""

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        both = torch.broadcast_tensors(a, b)
        out: Tensor = pick(*both)
        return out.contiguous()

    return chosen
