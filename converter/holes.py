"""Modules that torch.export cannot follow stand in the graph as one operation: a hole.

Experts that are chosen by data, loops over lists of sizes: they hold no attention, and yet they
stop the capture of the whole model. So they are left out of the trace. What is known of a hole is
how the shapes of its results follow from those of its inputs, learnt by running the model at two
sizes; in the captured graph it calls the model's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from reattend.inputs import resized
from reattend.running import evaluation

#: a size of a result: a number, or the product of sizes (input, axis)
Size = int | tuple[tuple[int, int], ...]
#: call by call, result by result, axis by axis
Sizes = list[list[tuple[Size, ...]]]
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
_open: ContextVar[list[Hole] | None] = ContextVar("open_holes", default=None)


class Unshaped(Exception):
    """The results of a module are no tensors whose shapes follow from its inputs."""


@dataclass
class _Seen:
    """One call of a module: shapes of its input tensors, results, how these are nested."""

    inputs: list[torch.Size]
    outputs: list[Any]
    nesting: TreeSpec


class Hole(nn.Module):
    """Calls a module with the tensors of one of its calls; everything else is as it was traced.

    Args:
        module: of the model.
        sizes: of every result, axis by axis.
        seen: the call.
    """

    def __init__(self, module: nn.Module, sizes: list[tuple[Size, ...]], seen: _Seen) -> None:
        super().__init__()
        self.module, self.sizes, self.seen = module, sizes, seen
        self.others: list[Any] = []
        self.nesting: TreeSpec | None = None
        self.dtypes: list[torch.dtype] = []

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Note a call's arguments; returns its tensors.

        Raises:
            Unshaped: it takes sizes, caches or other objects, which a graph cannot hand over.
        """
        leaves, self.nesting = tree_flatten((args, kwargs))
        if any(not isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            raise Unshaped("it is called with objects that are not tensors or numbers")
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.given = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.dtypes = [t.dtype for t in tensors]
        return tensors

    def shaped(self, tensors: list[Tensor]) -> list[Tensor]:
        """Results without values."""
        made = []
        results = [r for r in self.seen.outputs if isinstance(r, Tensor)]
        for sizes, like in zip(self.sizes, results, strict=True):
            shape: list[Any] = []
            for size in sizes:
                count: Any = size if isinstance(size, int) else 1
                for tensor, axis in size if isinstance(size, tuple) else ():
                    count = count * tensors[tensor].shape[axis]
                shape.append(count)
            made.append(tensors[0].new_empty(shape, dtype=like.dtype))
        return made

    def nested(self, results: list[Tensor]) -> Any:
        """Results as the module returns them."""
        left = iter(results)
        leaves = [next(left) if isinstance(r, Tensor) else r for r in self.seen.outputs]
        return tree_unflatten(leaves, self.seen.nesting)

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The module's result tensors, in evaluation mode and in the dtypes of the capture."""
        assert self.nesting is not None
        leaves = list(self.others)
        for at, tensor, dtype in zip(self.given, tensors, self.dtypes, strict=True):
            leaves[at] = tensor.to(dtype)
        args, kwargs = tree_unflatten(leaves, self.nesting)
        with evaluation(self.module):
            result = self.module(*args, **kwargs)
        return tuple(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))


@torch.library.custom_op("reattend::hole", mutates_args=())
def hole(number: int, tensors: list[Tensor]) -> list[Tensor]:
    """One call of a module that is not traced."""
    holes = _open.get()
    assert holes is not None
    return [t.clone() for t in holes[number](*tensors)]


@hole.register_fake
def _shapes(number: int, tensors: list[Tensor]) -> list[Tensor]:
    holes = _open.get()
    assert holes is not None
    return holes[number].shaped(tensors)


class Openings:
    """What is known of the calls of every submodule, from two runs of the model.

    Args:
        model: not changed.
        inputs: example keyword arguments.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = model
        self.first = _watch(model, inputs)
        self.second = _watch(model, _grown(inputs))

    def sizes(self, path: str) -> Sizes:
        """For every call of a module, the sizes of its results.

        Raises:
            Unshaped: they do not follow from its inputs.
        """
        pairs = zip(self.first.get(path, ()), self.second.get(path, ()), strict=True)
        return [_rule(a, b) for a, b in pairs]

    @contextmanager
    def open(self, paths: dict[str, Sizes]) -> Iterator[list[Hole]]:
        """Leave these modules out of what is traced inside; yields the holes as they are met."""
        holes: list[Hole] = []
        token = _open.set(holes)
        before: list[tuple[nn.Module, Any]] = []
        for path, rules in paths.items():
            module = self.model.get_submodule(path)
            before.append((module, vars(module).get("forward")))
            module.forward = self._left_out(module, path, rules, holes)
        try:
            yield holes
        finally:
            _open.reset(token)
            for module, own in before:
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def _left_out(
        self,
        module: nn.Module,
        path: str,
        rules: Sizes,
        holes: list[Hole],
    ) -> Callable[..., Any]:
        calls = iter(zip(rules, self.first[path], strict=True))
        inside = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            made = Hole(module, *next(calls))
            holes.append(made)
            return made.nested(hole(len(holes) - 1, made.trace(args, kwargs)))

        forward.__wrapped__ = inside  # type: ignore[attr-defined]  # its signature
        return forward


def fill(gm: fx.GraphModule, holes: list[Hole]) -> None:
    """Every hole of a traced graph calls its module."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.reattend.hole.default:
            continue
        number, tensors = node.args
        name = f"hole_{number}"
        gm.add_submodule(name, holes[number])
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(name, tuple(tensors))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.recompile()


def _watch(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[_Seen]]:
    """Every call of every submodule."""
    seen: dict[str, list[_Seen]] = {}
    handles = []
    for path, module in model.named_modules():

        def hook(_m: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            shapes = [t.shape for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            leaves, nesting = tree_flatten(output)
            small = [t.new_empty(t.shape, device="meta") if isinstance(t, Tensor) else t
                     for t in leaves]  # fmt: skip
            seen.setdefault(path, []).append(_Seen(shapes, small, nesting))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _grown(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with one more row, and longer."""
    tensors = [v for v in inputs.values() if isinstance(v, Tensor) and v.dim() >= 2]
    if not tensors:
        return inputs
    batch, length = tensors[0].shape[:2]
    grown = inputs if tensors[0].dim() > 3 else resized(inputs, length, length + 8)  # images: rows
    return {
        name: torch.cat([value, value[:1]])
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
        else value
        for name, value in grown.items()
    }


def _rule(a: _Seen, b: _Seen) -> list[tuple[Size, ...]]:
    """Sizes of results that hold in both runs."""
    plain = [r for r in (*a.outputs, *b.outputs) if not isinstance(r, Tensor)]
    if a.nesting != b.nesting or any(not isinstance(r, _PLAIN) for r in plain):
        raise Unshaped("it returns something else than tensors")
    if not a.inputs or len(a.inputs) != len(b.inputs):
        raise Unshaped("it is not called with the same number of tensors each time")
    axes = [(i, axis) for i, shape in enumerate(a.inputs) for axis in range(len(shape))]
    if any(len(x) != len(y) for x, y in zip(a.inputs, b.inputs, strict=True)):
        raise Unshaped("its inputs have other numbers of axes each time")
    ways: list[tuple[tuple[int, int], ...]] = [(at,) for at in axes]
    ways += combinations_with_replacement(axes, 2)
    values = {way: (_product(a.inputs, way), _product(b.inputs, way)) for way in ways}
    rules = []
    for one, two in zip(a.outputs, b.outputs, strict=True):
        if isinstance(one, Tensor) != isinstance(two, Tensor):
            raise Unshaped("it returns other things each time")
        if isinstance(one, Tensor):
            rules.append(_sizes(one.shape, two.shape, values))
    if not rules:
        raise Unshaped("it returns no tensor")
    return rules


def _sizes(
    one: torch.Size, two: torch.Size, values: dict[tuple[tuple[int, int], ...], tuple[int, int]]
) -> tuple[Size, ...]:
    if len(one) != len(two):
        raise Unshaped("its results have other numbers of axes each time")
    found: list[Size] = []
    for x, y in zip(one, two, strict=True):
        way = next((w for w, sizes in values.items() if sizes == (x, y)), None)
        if x != y and way is None:
            raise Unshaped(f"a size of its results ({x}, then {y}) is none of its inputs'")
        found.append(x if x == y else way)  # type: ignore[arg-type]
    return tuple(found)


def _product(shapes: list[torch.Size], way: tuple[tuple[int, int], ...]) -> int:
    count = 1
    for tensor, axis in way:
        count *= shapes[tensor][axis]
    return count
