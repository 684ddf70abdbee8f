"""What an owner does besides its block, cut out of the graph as programs around the mixer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.capture import Call, Capture
from reattend.frame import Frame, call_number
from reattend.install.around import Around
from reattend.install.binding import equal, leaves, same
from reattend.install.pieces import AFTER, BEFORE, MIXED, AroundConfig, Feed, Path, Piece
from reattend.passes.evaluate import ancestors, attribute, parameter_only
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.passes.normalize.forms import attention, is_op
from reattend.program import Uncuttable, cut
from reattend.sizes import CallSizes


@dataclass
class Surrounding:
    """The programs of one owner, and where their weights are.

    Attributes:
        config: what a checkpoint stores.
        weights: by piece (`before.hidden`), the attribute of the graph each weight was.
        constants: attributes of the graph that are no tensors of the model.
        width: of the mixer's output.
        arguments: nodes that are arguments of the owner's call.
        outputs: where in the owner's result each node's value stands.
    """

    config: AroundConfig
    weights: dict[str, dict[str, str]]
    constants: dict[str, Tensor]
    width: int
    arguments: dict[fx.Node, Path] = field(repr=False)
    outputs: list[tuple[Path, fx.Node]] = field(repr=False)

    def names(self) -> set[str]:
        """Every attribute of the graph that the programs own."""
        return {at for own in self.weights.values() for at in own.values()}


class Surround:
    """Cuts the programs of one owner.

    Args:
        captured: the graph.
        item: the block inside.
        place: the owner's call in the graph.
        arguments: leaves of the watched call, by name.
        values: of the frame's entries and exits in that call.
        y: the node the mixer computes.
    """

    def __init__(
        self,
        captured: Capture,
        item: Found,
        place: Frame,
        arguments: dict[str, Any],
        values: dict[fx.Node, Any],
        y: fx.Node,
    ) -> None:
        self.captured, self.gm, self.place, self.y = captured, captured.gm, place, y
        self.values = values
        number = call_number(item.region.core, place.path)
        self.told = CallSizes(captured, place.path, number, arguments)
        self.streams = {n for s in item.region.streams.values() for n in s.nodes}
        self.core = item.region.core
        self.arguments: dict[fx.Node, Path] = {}
        for node in place.entries:
            scored = [(same(leaf, values[node]), path) for path, leaf in leaves(arguments)]
            best = min(scored, key=lambda s: s[0], default=None)
            if best is not None and equal(_at(arguments, best[1]), values[node]):
                self.arguments[node] = best[1]
        self.before: dict[str, Piece] = {}
        self.after: list[Piece] = []
        self.weights: dict[str, dict[str, str]] = {}
        self.given: dict[fx.Node, Path] = {}  # what `before` makes, for `after`

    def enter(self, name: str, node: fx.Node) -> Path:
        """Where the mixer's input stands: an argument, or a program of `before`."""
        if node not in self.arguments:
            piece, self.weights[f"before.{name}"] = self._piece(node, {})
            self.before[name] = piece
            if name in ("hidden", "memory"):
                self.given[node] = (BEFORE, name)
            return (BEFORE, name)
        return self.arguments[node]

    def drop(self, name: str) -> None:
        """Forget a program of `before`."""
        self.before.pop(name, None)
        self.weights.pop(f"before.{name}", None)

    def result(
        self, call: Call, arguments: dict[str, Any], bias_1HNM: Tensor
    ) -> tuple[Any, list[tuple[Path, fx.Node]]]:
        """(`Binding.output` of the owner's result, which node stands where in it).

        Raises:
            NotUnderstood: attention is not in the result, or leaves by another way.
        """
        outputs: list[tuple[Path, fx.Node]] = []
        returned: list[Tensor] = []
        own = list(self.captured.model.get_submodule(self.place.path).parameters())

        def walk(part: Any, path: Path) -> Any:
            if type(part) in (tuple, list):
                items = [walk(item, (*path, i)) for i, item in enumerate(part)]
                return {type(part).__name__: items}
            passed = [p for p, leaf in leaves(arguments) if part is not None and leaf is part]
            if not isinstance(part, Tensor):
                return {"path": list(passed[0])} if passed else None
            if any(part is weight for weight in own):
                raise NotUnderstood(
                    f"{self.place.path} returns a weight of its own beside attention"
                )
            returned.append(part)
            node = self._exit(part)
            if node is not self.y and (passed or equal(part, bias_1HNM)):
                return {"path": list(passed[0])} if passed else "bias"
            if node is None:
                return None  # attention weights, which nobody reads
            outputs.append((path, node))
            return "y" if node is self.y else {"path": self._leave(node)}

        shape = walk(call.output, ())
        if not any(self._made_of_y(node) for _, node in outputs):
            raise NotUnderstood(f"nothing that {self.place.path} returns is made of its attention")
        for node in self.place.exits:
            if not any(equal(v, self.values[node]) for v in returned):
                raise NotUnderstood(
                    f"{self.place.path} hands {node.name} on by another way than its result"
                )
        return shape, outputs

    def _leave(self, node: fx.Node) -> list[str | int]:
        """Where a tensor of the result stands beside the arguments: a program of `after`."""
        number = len(self.after)
        piece, self.weights[f"after.{number}"] = self._piece(node, {self.y: (MIXED,), **self.given})
        self.after.append(piece)
        return [AFTER, number]

    def _made_of_y(self, node: fx.Node) -> bool:
        return self.y in ancestors([node], stop=lambda n: n is self.y or n in self.arguments)

    def _exit(self, part: Tensor) -> fx.Node | None:
        """The node whose value is returned; the mixer's own where it is one of several."""
        nodes = [self.y, *reversed(self.place.exits)]
        hits = [n for n in nodes if n in self.values and equal(part, self.values[n])]
        return min(hits, key=lambda n: same(part, self.values[n])) if hits else None

    def _piece(self, output: fx.Node, extra: dict[fx.Node, Path]) -> tuple[Piece, dict[str, str]]:
        """The program of `output` and the attributes its weights were.

        Raises:
            NotUnderstood: it needs more than the call's arguments, or another core.
        """
        feeds = {node: Feed(path=path) for node, path in {**extra, **self.arguments}.items()}
        dtype = output.meta["val"].dtype
        tensors = sorted(feeds, key=lambda n: (_dtype(n) != dtype, n not in extra, not _floats(n)))
        sizes = _sizes(tensors)
        needed = ancestors([output], stop=lambda n: n in feeds)
        for node in needed:
            if node not in feeds and isinstance(node.meta.get("val"), torch.SymInt):
                at = sizes.get(str(node.meta["val"]))
                told = self.told.place(node) if at is None else None
                if at is not None:
                    feeds[node] = Feed(path=feeds[at[0]].path, axis=at[1])
                elif told is not None:
                    feeds[node] = Feed(path=told)
        needed = ancestors([output], stop=lambda n: n in feeds)
        self._check(needed - feeds.keys())
        used = [n for n in feeds if n in needed]
        used.sort(key=lambda n: tensors.index(n) if n in tensors else len(tensors))
        if not used or used[0] not in tensors:
            raise NotUnderstood(f"{output.name} in {self.place.path} depends on no argument")
        first = _dtype(used[0])
        cast = first is not None and first.is_floating_point and dtype.is_floating_point
        if cast and dtype != first:
            raise NotUnderstood(f"{self.place.path} changes the dtype of {output.name}")
        try:
            program, sources = cut(self.gm, output, {n: f"x{i}" for i, n in enumerate(used)})
        except Uncuttable as why:
            raise NotUnderstood(f"{self.place.path}: {output.name}: {why}") from why
        return Piece(program=program, feeds=tuple(feeds[n] for n in used)), sources

    def _check(self, needed: set[fx.Node]) -> None:
        path = self.place.path
        for node in self.place.entries:
            if node in needed and not parameter_only(node):
                raise NotUnderstood(f"{path} reads {node.name}, which is no argument of its call")
        for node in needed:
            if _changes_shared(node):
                raise NotUnderstood(f"{path} changes a tensor in place that is read elsewhere")
            if node is self.core:
                raise NotUnderstood(f"{path} uses its attention otherwise than through its output")
            if is_op(node, attention):
                raise NotUnderstood(f"{path} holds a second attention core beside this one")
        if self.streams & needed:
            raise NotUnderstood(f"{path} uses queries, keys or values outside of its attention")

    def done(self, outputs: list[tuple[Path, fx.Node]], dropout: bool) -> Surrounding:
        """What was cut. `dropout`: the owner drops activations while training."""
        model = self.captured.model
        held = {n for n, _ in model.named_parameters(remove_duplicate=False)}
        held |= {n for n, _ in model.named_buffers(remove_duplicate=False)}
        config = AroundConfig(before=self.before, after=tuple(self.after), dropout=dropout)
        width = int(self.y.meta["val"].shape[-1])
        found = Surrounding(config, self.weights, {}, width, self.arguments, outputs)
        for name in found.names() - held:
            found.constants[name] = attribute(self.gm, name).detach()
        return found


def _changes_shared(node: fx.Node) -> bool:
    """Whether an operation writes into a tensor that has other readers: order would matter."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    return any(
        isinstance(value, fx.Node) and (len(value.users) > 1 or value.op != "call_function")
        for value, argument in zip(node.args, schema.arguments, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _at(arguments: dict[str, Any], path: Path) -> Any:
    return next(leaf for at, leaf in leaves(arguments) if at == path)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


def _sizes(tensors: list[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """Symbol -> (tensor, axis) that has this size; the first tensor that has it."""
    found: dict[str, tuple[fx.Node, int]] = {}
    for node in tensors:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                found.setdefault(str(size), (node, axis))
    return found


def filled(surrounding: Surrounding, lookup: Any) -> Around:
    """The programs with weights: `lookup(name)` gives the model's tensor of an attribute."""
    around = Around(surrounding.config)
    for name, sources in surrounding.weights.items():
        module = around.get_submodule(name)
        for weight, at in sources.items():
            constant = surrounding.constants.get(at)
            fill(module, weight, lookup(at) if constant is None else constant)
    return around.eval()


def fill(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the weight; a parameter object keeps its identity."""
    if name in module._buffers:
        module._buffers[name] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
