"""Run any part of a captured graph, on demand.

The one tool behind every probe: masks, row maps, rotations and the self-check all ask for the
value of some node under given values of others. Only what is needed is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes import vmapped
from reattend.passes.aliases import memory_of, writes, written

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def attribute(gm: fx.GraphModule, target: str) -> Any:
    """The tensor a `get_attr` node reads."""
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def parameter_only(node: fx.Node) -> bool:
    """Whether a value depends on weights and constants alone, never on an input."""
    return not any(n.op == "placeholder" for n in ancestors([node]))


def ancestors(
    wanted: Iterable[fx.Node], stop: Callable[[fx.Node], bool] | None = None
) -> set[fx.Node]:
    """`wanted` and everything they are computed from; nodes where `stop` holds end the walk."""
    seen: set[fx.Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if stop is None or not stop(node):
            todo.extend(node.all_input_nodes)
    return seen


def on_paths(end: fx.Node, starts: tuple[fx.Node, ...]) -> set[fx.Node]:
    """Nodes on a path from where a stream starts to its end, both included."""
    behind = ancestors([end], stop=lambda n: n in starts)
    found = set(starts)
    for node in end.graph.nodes:
        if node in behind and any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def with_writes(
    graph: fx.Graph, needed: set[fx.Node], fixed: Collection[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What has to run so that `needed` nodes see every write before them.

    Args:
        graph: as captured.
        needed: nodes that are to be run.
        fixed: nodes whose values are given; what they are computed from is not run.

    Returns:
        `needed` with the writes and what these need; and those of them that are written to
        anywhere, whose values change while the graph runs.
    """
    if not written(needed):
        return needed, set()
    writers = [n for n in graph.nodes if writes(n) is not None]
    place = {n: i for i, n in enumerate(graph.nodes)}
    roots = memory_of(graph)
    needed = set(needed)
    while True:
        read: dict[fx.Node, int] = {}
        for node in needed:
            for source in node.all_input_nodes:
                read[roots[source]] = max(read.get(roots[source], -1), place[node])
        missing = [w for w in writers if w not in needed and place[w] < read.get(roots[w], -1)]
        if not missing:
            break
        needed |= ancestors(missing, stop=lambda n: n in fixed)
    changed = {roots[w] for w in writers if w in needed}
    return needed, {n for n in needed if roots[n] in changed}


def concrete_shape(node: fx.Node, given: Mapping[fx.Node, Any]) -> list[int]:
    """The shape a node has under these inputs: symbols take the sizes the inputs give them.

    Symbols that no input fixes keep the value they had at capture.
    """
    sizes: dict[Any, int] = {}
    for placeholder, value in given.items():
        known = placeholder.meta.get("val")
        if isinstance(value, Tensor) and isinstance(known, Tensor):
            for symbol, size in zip(known.shape, value.shape, strict=True):
                if isinstance(symbol, torch.SymInt) and symbol.node.expr.is_symbol:
                    sizes[symbol.node.expr] = int(size)
    shape = []
    for size in node.meta["val"].shape:
        if not isinstance(size, torch.SymInt):
            shape.append(int(size))
            continue
        value = size.node.expr.subs(sizes)
        shape.append(int(value) if value.is_number else int(size.node.hint))
    return shape


class Evaluator:
    """Evaluates nodes of `gm`.

    Args:
        gm: a captured (functional, aten-level) graph.
        promote: run in this dtype: float weights, given values and every float32/16 dtype
            argument become it, so the model's own down-casts do not hide errors.
        weights: tensors used instead of the stored ones, by attribute name.
        replace: nodes computed by another function of the same arguments.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        *,
        promote: torch.dtype | None = None,
        weights: Mapping[str, Tensor] | None = None,
        replace: Mapping[fx.Node, Callable[..., Any]] | None = None,
    ) -> None:
        self.gm, self.promote = gm, promote
        self.weights, self.replace = dict(weights or {}), dict(replace or {})

    def _cast(self, value: Any) -> Any:
        if self.promote is None:
            return value
        if isinstance(value, Tensor) and value.dtype in _FLOATS:
            return value.to(self.promote)
        if isinstance(value, torch.dtype) and value in _FLOATS:
            return self.promote
        return value

    @torch.no_grad()
    def run(self, wanted: list[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
        """Values of `wanted`, with `given` nodes fixed.

        Raises:
            KeyError: a placeholder is needed that was not given.
        """
        env: dict[fx.Node, Any] = {n: self._cast(v) for n, v in given.items()}
        needed = ancestors(wanted, stop=lambda n: n in env)
        needed |= ancestors(vmapped.levels(needed), stop=lambda n: n in env)
        needed, changing = with_writes(self.gm.graph, needed, env)
        kept = {n: env[n] for n in changing & env.keys()}
        env.update({n: _copied(v) for n, v in kept.items()})
        with vmapped.balanced():
            self._compute_all(needed, wanted, given, env, changing & set(wanted), kept)
        return [kept.get(n, env.get(n)) for n in wanted]

    def _compute_all(
        self,
        needed: set[fx.Node],
        wanted: list[fx.Node],
        given: Mapping[fx.Node, Any],
        env: dict[fx.Node, Any],
        changing: set[fx.Node],
        kept: dict[fx.Node, Any],
    ) -> None:
        """Fill `env` in graph order; a value is dropped after its last use.

        Wanted values that a later node writes into go to `kept` as they are when computed.
        """
        uses = {n: sum(u in needed for u in n.users) for n in needed}
        keep = set(wanted)
        for node in self.gm.graph.nodes:
            if node not in needed or node in env:
                continue
            env[node] = self._compute(node, env)
            if node in changing:
                kept[node] = _copied(env[node])
            for source in node.all_input_nodes:
                uses[source] -= 1
                if uses[source] == 0 and source not in keep and source not in given:
                    env.pop(source, None)

    def _compute(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            name = str(node.target)
            value = self.weights.get(name)
            return self._cast(attribute(self.gm, name) if value is None else value)
        if node.op == "placeholder":
            raise KeyError(f"input {node.name!r} is needed here but was not given")
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        if self.promote is not None:
            args = torch.utils._pytree.tree_map(self._cast, args)
            kwargs = torch.utils._pytree.tree_map(self._cast, kwargs)
        if node in self.replace:
            return self.replace[node](*args, **kwargs)
        if node.op == "call_module":
            made = self.gm.get_submodule(str(node.target))(*args, **kwargs)
            return torch.utils._pytree.tree_map(self._cast, made)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return self._cast(node.target(*args, **kwargs))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
