"""The way from a projection to a core, run on codes: it shows which row and token goes where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reattend.passes.evaluate import Evaluator, ancestors, on_paths, parameter_only
from reattend.passes.normalize.forms import is_projection


@dataclass(frozen=True)
class Way:
    """What stands between one projection and a core's input.

    Attributes:
        projection: where it begins.
        chain: what follows, the core's input last.
        shape: of the projection, as it was at capture.
        push: from a projection's value, broadcast to its shape, to the core's input in float64.
    """

    projection: fx.Node
    chain: list[fx.Node]
    shape: list[int]
    push: Callable[[Tensor], Tensor]


def the_projection(stream: fx.Node) -> fx.Node | None:
    """The one nearest projection behind a core's input; None where there are several or none."""
    found = [n for n in ancestors([stream], stop=is_projection) if is_projection(n)]
    return found[0] if len(found) == 1 else None


def way_to(gm: fx.GraphModule, stream: fx.Node) -> Way | None:
    """The way to a core's input; None where it reads more than one projection, sizes, weights."""
    projection = the_projection(stream)
    if projection is None:
        return None
    on_path = on_paths(stream, (projection,))
    chain = [n for n in gm.graph.nodes if n in on_path and n is not projection]
    beside = {i for n in chain for i in n.all_input_nodes if i not in on_path}
    sizes = {n for n in beside if isinstance(n.meta.get("val"), torch.SymInt)}
    if any(not parameter_only(n) for n in beside - sizes):
        return None
    given: dict[fx.Node, Any] = {n: known(n.meta["val"]) for n in sizes}
    shape = [known(s) for s in projection.meta["val"].shape]
    run = Evaluator(gm, promote=torch.float64)

    def push(code: Tensor) -> Tensor:
        made: Tensor = run.run([stream], {**given, projection: code.expand(shape).clone()})[0]
        return made

    return Way(projection, chain, shape, push)


def known(size: Any) -> int:
    """A size as it was at capture."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
