"""A piece of a captured graph as plain data: what a block computes in its own way.

Steps that have no word of their own in `reattend.spec` (a gate's activation, a residual inside
the owner, a bias made from the call's arguments) are carried along as they were captured. A
program is stored in `config.json` and rebuilt from there, so it holds names of operators from a
closed list and numbers, never code. Its weights are ordinary parameters of `ProgramModule`.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.errors import ModelError
from reattend.mixers.config import Program, Step, Weight
from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.normalize import forms

__all__ = ["Program", "ProgramModule", "Step", "Uncuttable", "Weight", "cut"]

_PYTHON: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name)
        for name in (
            "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem",
            "eq", "ne", "lt", "le", "gt", "ge",
        )
    },
    **{name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_float")},
    **{name: getattr(math, name) for name in ("ceil", "floor", "trunc")},
    "rms_norm": forms.rms_norm,
    "attention": forms.attention,
}  # fmt: skip
_NAMES = {function: name for name, function in _PYTHON.items()}


class Uncuttable(Exception):
    """The wanted part of the graph is not a function of the given inputs. `node`: where it ends."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        super().__init__(reason)
        self.node = node


def cut(
    gm: fx.GraphModule, output: fx.Node, inputs: Mapping[fx.Node, str]
) -> tuple[Program, dict[str, str]]:
    """The part of a normalised graph that computes `output` from `inputs`.

    Args:
        gm: the graph.
        output: the value wanted.
        inputs: nodes that are given, and their names.

    Returns:
        The program, and for each of its weights the attribute of `gm` it was.

    Raises:
        Uncuttable: the value depends on another input of the graph, or an operation has no name.
    """
    needed = ancestors([output], stop=lambda n: n in inputs)
    names = dict(inputs)
    weights: dict[str, Weight] = {}
    sources: dict[str, str] = {}
    steps: list[Step] = []
    for node in gm.graph.nodes:
        if node not in needed or node in inputs:
            continue
        if node.op == "placeholder":
            raise Uncuttable(f"it also depends on the model's input {node.name!r}", node)
        if node.op == "get_attr":
            name = names[node] = f"w{len(weights)}"
            value = attribute(gm, str(node.target))
            weights[name] = Weight(
                shape=tuple(value.shape),
                dtype=str(value.dtype)[6:],
                trained=isinstance(value, nn.Parameter),
            )
            sources[name] = str(node.target)
            continue
        name = names[node] = f"s{len(steps)}"
        coded = _Coder(names)
        steps.append(
            Step(
                name=name,
                call=_call_name(node),
                args=tuple(coded(a) for a in node.args),
                kwargs={k: coded(v) for k, v in node.kwargs.items()},
            )
        )
        if _floats_of_integers(node):  # the dtype's name follows the program's input
            kept = {"torch": str(node.meta["val"].dtype)[6:]}
            names[node] = f"{name}f"
            steps.append(Step(name=f"{name}f", call="aten.to.dtype", args=({"value": name}, kept)))
    program = Program(
        inputs=tuple(inputs.values()), weights=weights, steps=tuple(steps), output=names[output]
    )
    return program, sources


def _floats_of_integers(node: fx.Node) -> bool:
    """Whether torch's default dtype decides what this gives: integers divided, say."""
    made = [node.meta.get("val"), *(n.meta.get("val") for n in node.all_input_nodes)]
    told = any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
    floats = [isinstance(v, Tensor) and v.is_floating_point() for v in made]
    return floats[0] and not any(floats[1:]) and not told


def _call_name(node: fx.Node) -> str:
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten":
            return str(node.target)
        if node.target in _NAMES:
            return _NAMES[node.target]
    raise Uncuttable(f"{node.name} ({node.target}) is not a plain tensor operation", node)


class _Coder:
    """Arguments as JSON: numbers and words as they are, everything else a one-key object."""

    def __init__(self, names: Mapping[fx.Node, str]) -> None:
        self.names = names

    def __call__(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"value": self.names[value]}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": repr(value)}
        if isinstance(value, slice):
            return {"slice": [self(p) for p in (value.start, value.stop, value.step)]}
        for kind in (torch.dtype, torch.memory_format, torch.layout):
            if isinstance(value, kind):
                return {"torch": str(value)[6:]}
        if isinstance(value, torch.device):
            return {"device": None}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"an argument of type {type(value).__name__} cannot be stored")


def device_of(x: Tensor) -> torch.device:
    """Where the program runs: where its first input is."""
    return x.device


def dtype_beside(x: Tensor, wanted: torch.dtype) -> torch.dtype:
    """The dtype an operation asked for at capture; in a float64 run all floats are float64."""
    return x.dtype if x.dtype == torch.float64 and wanted.is_floating_point else wanted


class ProgramModule(nn.Module):
    """Runs a program. Parameters and buffers carry the names of its weights."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for name, weight in program.weights.items():
            dtype = getattr(torch, weight.dtype)
            kept = torch.zeros(weight.shape, dtype=None if dtype.is_floating_point else dtype)
            if dtype.is_floating_point and weight.trained:
                self.register_parameter(name, nn.Parameter(kept))
            else:
                self.register_buffer(name, kept)
        self.body = fx.GraphModule({}, _graph(program))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The program's output; a floating one in the dtype of the first input."""
        weights = [getattr(self, name) for name in self.program.weights]
        y: Tensor = self.body(*inputs, *weights)
        like = inputs[0]
        if y.is_floating_point() and like.is_floating_point() and y.dtype != like.dtype:
            y = y.to(like.dtype)
        return y


def _graph(program: Program) -> fx.Graph:
    graph = fx.Graph()
    values = {name: graph.placeholder(name) for name in (*program.inputs, *program.weights)}
    first = values[program.inputs[0]]

    def decoded(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind, content = next(iter(value.items()))
        if kind == "value":
            return values[content]
        if kind == "number":
            return float(content)
        if kind == "slice":
            return slice(*(decoded(p) for p in content))
        if kind == "device":
            return graph.call_function(device_of, (first,))
        found = getattr(torch, content)
        if isinstance(found, torch.dtype):
            return graph.call_function(dtype_beside, (first, found))
        return found

    for step in program.steps:
        args = tuple(decoded(a) for a in step.args)
        kwargs = {k: decoded(v) for k, v in step.kwargs.items()}
        values[step.name] = graph.call_function(_function(step.call), args, kwargs)
    graph.output(values[program.output])
    graph.lint()
    return graph


def _function(call: str) -> Callable[..., Any]:
    """The operator of a stored name; only aten operators and the closed list exist."""
    if call in _PYTHON:
        return _PYTHON[call]
    parts = call.split(".")
    if len(parts) == 3 and parts[0] == "aten":
        packet = builtins.getattr(torch.ops.aten, parts[1], None)
        overload = builtins.getattr(packet, parts[2], None) if packet is not None else None
        if isinstance(overload, torch._ops.OpOverload):
            return overload
    raise ModelError(
        f"this checkpoint uses the operation {call!r}, which this installation does not have",
        next_step="update torch and reattend, or convert the model again with these versions",
    )
