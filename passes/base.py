"""A pass: match (what), check (when legal), rewrite (what instead).

The base class executes the contract: it applies `rewrite` to every match that passes `check`,
lints the graph, and counts what happened, so a pass that matches nothing is visible.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from reattend.passes import vmapped

#: `node.meta` key: name of the node of the graph as captured that has this value
CAPTURED = "captured"
#: `node.meta` key of a core: how many cores of the model it stands for, where not one
CORES = "cores"
#: `node.meta` key of a core that was spelled out: the scores its softmax read
SCORES = "scores"


@dataclass(frozen=True)
class Refusal:
    """Why something is not done, in words a user can act on."""

    reason: str


@dataclass
class PassResult:
    """What a pass did: how many rewrites, and the reasons of those it refused.

    `paths`: of the module whose code a refused node comes from; the node may be gone later.
    """

    name: str
    rewrites: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether the graph changed."""
        return self.rewrites > 0


class GraphPass(ABC):
    """One rewrite of a captured graph, in place."""

    name: str

    @abstractmethod
    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """The nodes this pass is about, in graph order."""

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """Why this node must stay as it is, or None."""
        return None

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Replace `node` and erase what nobody uses any more."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Apply to every match; the graph is linted and recompiled if it changed."""
        result = PassResult(self.name)
        for node in list(self.match(gm)):
            if node._erased:  # nothing read it, and an earlier rewrite tidied up
                continue
            if (refusal := self.check(gm, node)) is not None:
                result.refused.append((node.name, refusal.reason))
                result.paths[node.name] = path_of(node)
                continue
            self.rewrite(gm, node)
            result.rewrites += 1
        if result.modified:
            gm.graph.lint()
            gm.recompile()
        return result


def path_of(node: fx.Node) -> str:
    """Dotted path of the module whose code computes a node; empty where that is not known."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack else ""


def call(gm: fx.GraphModule, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node at the insertion point, with its value's shape and dtype."""
    node = gm.graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


def owned(new: fx.Node, like: fx.Node) -> None:
    """What was made for `new` counts with the module whose code `like` comes from."""
    stack = like.meta.get("nn_module_stack")
    todo = [new]
    while stack is not None and todo:
        made = todo.pop()
        if "nn_module_stack" in made.meta or made.op != "call_function":
            continue
        made.meta["nn_module_stack"] = stack
        todo += made.all_input_nodes


def drop_dead(graph: fx.Graph) -> None:
    """Erase what nothing uses; levels of vmap stay, since values between them depend on them."""
    graph.eliminate_dead_code(lambda n: n.is_impure() or vmapped.opens(n) or vmapped.closes(n))


def replace_node(node: fx.Node, new: fx.Node) -> None:
    """Point every user of `node` to `new`, keep its metadata, and erase it."""
    new.meta.update({k: v for k, v in node.meta.items() if k not in new.meta})
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
