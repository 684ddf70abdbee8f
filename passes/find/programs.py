"""Cut a part of a block as a program: sizes read off its inputs, small constants written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.normalize.forms import aten, attention, is_op
from reattend.program import Program, Step, Uncuttable, cut


@dataclass(frozen=True)
class CutOut:
    """A program and, for each of its weights, the attribute it was."""

    program: Program
    sources: tuple[tuple[str, str], ...]


def cut_out(
    gm: fx.GraphModule, output: fx.Node, inputs: Mapping[fx.Node, str], what: str
) -> CutOut:
    """The part that computes `output` from tensors `inputs`; `what` names it in a refusal.

    Raises:
        NotUnderstood: it depends on anything else, or another attention core lies inside.
    """

    def size(node: fx.Node) -> bool:
        return is_op(node, aten.sym_size) or _axis(node, inputs) is not None

    needed = ancestors([output], stop=lambda n: n in inputs or size(n))
    if any(is_op(n, attention) for n in needed - set(inputs)):
        raise NotUnderstood(f"{what} holds another attention core")
    prefix: list[Step] = []
    given = dict(inputs)
    for node in gm.graph.nodes:
        if node in inputs or node not in needed:
            continue
        if size(node):
            given[node] = f"n{len(prefix)}"
            prefix += _size(node, inputs, given[node], what)
        elif node.op == "get_attr" and (number := _constant(gm, str(node.target))) is not None:
            given[node] = f"n{len(prefix)}"
            value, dtype = number
            prefix.append(
                Step(
                    name=given[node],
                    call="aten.scalar_tensor.default",
                    args=(value,),
                    kwargs={"dtype": {"torch": dtype}, "device": {"device": None}},
                )
            )
    try:
        program, sources = cut(gm, output, given)
    except Uncuttable as why:
        raise NotUnderstood(f"{what}: {why}") from why
    program = program.model_copy(
        update={"inputs": tuple(inputs.values()), "steps": (*prefix, *program.steps)}
    )
    return CutOut(program, tuple(sorted(sources.items())))


def then(program: Program, call: str, *args: Any) -> Program:
    """The program with one more operation on its output."""
    name = f"t{len(program.steps)}"
    step = Step(name=name, call=call, args=({"value": program.output}, *args))
    return program.model_copy(update={"steps": (*program.steps, step), "output": name})


def _axis(node: fx.Node, inputs: Mapping[fx.Node, str]) -> tuple[str, int] | None:
    """The input and its axis that has this size, which may be computed (tokens of an image)."""
    wanted = node.meta.get("val")
    if not isinstance(wanted, torch.SymInt):
        return None
    for source, label in inputs.items():
        for axis, size in enumerate(_shape(source)):
            if str(size) == str(wanted):
                return label, axis
    return None


def _multiple(node: fx.Node, inputs: Mapping[fx.Node, str]) -> tuple[str, int, int] | None:
    """The input, its axis and how many times this size it has (windows of every image)."""
    wanted = node.meta["val"]
    for source, label in inputs.items():
        for axis, size in enumerate(_shape(source)):
            if isinstance(size, torch.SymInt) and isinstance(wanted, torch.SymInt):
                times = size.node.expr / wanted.node.expr
                if times.is_Integer and times > 1:
                    return label, axis, int(times)
    return None


def _shape(source: fx.Node) -> tuple[Any, ...]:
    value = source.meta["val"]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _size(node: fx.Node, inputs: Mapping[fx.Node, str], name: str, what: str) -> list[Step]:
    """A size of the model's inputs, read off one of the program's."""
    found = _axis(node, inputs)
    if found is not None:
        label, axis = found
        return [Step(name=name, call="aten.sym_size.int", args=({"value": label}, axis))]
    folded = _multiple(node, inputs)
    if folded is None:
        raise NotUnderstood(f"{what} depends on a size ({node.name}) that its inputs do not have")
    label, axis, times = folded
    whole = Step(name=f"{name}f", call="aten.sym_size.int", args=({"value": label}, axis))
    return [whole, Step(name=name, call="floordiv", args=({"value": whole.name}, times))]


def _constant(gm: fx.GraphModule, target: str) -> tuple[bool | int | float, str] | None:
    """A number that torch.export lifted out of the code: it is no weight of the model."""
    value = attribute(gm, target)
    lifted = not isinstance(value, Tensor) or "lifted" in target or "_tensor_constant" in target
    if not lifted or value.dim() > 0:
        return None
    return value.item(), str(value.dtype)[6:]
