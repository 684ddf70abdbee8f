"""The long story of one block: the steps it passed, what was read, the numbers of its proof."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, fx

from reattend.capture import Capture
from reattend.errors import ArgumentError
from reattend.found import STEPS, AttentionSite, FoundAttention, RefusedSite
from reattend.passes.base import path_of
from reattend.passes.evaluate import ancestors
from reattend.passes.find.sites import Found, Missed
from reattend.passes.normalize.forms import is_projection
from reattend.plan_words import nearest
from reattend.proof import Numbers, numbers_of, parts_of

#: nodes of a region that are listed
MOST = 120


@dataclass(frozen=True)
class Row:
    """A node of a block's subgraph: what it computes, from what, of which shape, whose code."""

    name: str
    call: str
    inputs: tuple[str, ...]
    shape: str
    path: str


@dataclass
class Explanation:
    """What is known of one block.

    Attributes:
        path, verdict: the block, and what became of it, in a sentence.
        passed: steps it passed (`reattend.found.STEPS`).
        failed: the step it failed, empty if none.
        node: where in the graph it failed.
        nearest: the understood form that comes closest.
        parts: what was read of each part, or why it could not be.
        numbers: of the self-check; None where it could not run.
        rows: the subgraph.
    """

    path: str
    verdict: str
    passed: list[str] = field(default_factory=list)
    failed: str = ""
    node: str = ""
    nearest: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    numbers: Numbers | None = None
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def explain(found: FoundAttention, path: str) -> Explanation:
    """The long story of the block at `path`, found or refused.

    Args:
        found: what `find_attention` returned.
        path: as it lists it; `(model)` for the model itself.

    Raises:
        ArgumentError: there is no such block; names the nearest.
    """
    wanted = "" if path == "(model)" else path
    blocks: list[AttentionSite | RefusedSite] = [*found.sites, *found.refused]
    for item in blocks:
        if item.path == wanted:
            return _of(found, item)
    known = sorted({i.path or "(model)" for i in blocks})
    close = [p for p in known if p.startswith(f"{path}.")] or nearest(path, known)
    raise ArgumentError(
        f"there is no attention block {path!r}",
        why=f"{len(known)} are known: {', '.join(known[:4])}{', ...' if len(known) > 4 else ''}"
        if known
        else "the model has none",
        next_step=f"did you mean {close[0]!r}?" if close else "list them: reattend find MODEL",
    )


def _of(found: FoundAttention, item: AttentionSite | RefusedSite) -> Explanation:
    """The story of what was found or refused."""
    path, steps, captured = item.path or "(model)", list(STEPS), found.capture
    if isinstance(item, AttentionSite):
        read = Found(item.spec, item.region, item.follows_padding)
        captured = item.capture or captured
        verdict = f"not proven yet: {item.deferred}" if item.deferred else "found and proven"
        passed = steps[: steps.index("own")] if item.deferred else steps
        told = Explanation(path, verdict, passed, nearest=item.spec.summary())
    else:
        done = steps[: steps.index(item.step)] if item.step in steps else []
        told = Explanation(
            path, f"refused: {item.reason}", done, item.step, item.node, item.nearest
        )
        if item.item is None:
            return told
        read = item.item  # type: ignore[assignment]
    told.parts = parts_of(captured, read)
    deferred = isinstance(item, AttentionSite) and bool(item.deferred)
    if isinstance(read, Found) and not deferred:
        told.numbers = numbers_of(captured, read)
    told.rows = rows(subgraph(read), letters(captured))
    return told


def subgraph(item: Found | Missed) -> list[fx.Node]:
    """The nodes of a block in graph order: from what enters it to what leaves it.

    Of a core that was not read: up to the nearest projections on both sides.
    """
    if isinstance(item, Found):
        region = item.region
        ends = {region.hidden, region.memory, region.mask, *region.externals, *region.extras}
        last, core = region.exit.node, region.core
    else:
        core = item.core
        ends, last = set(), _way_out(core)
        for node in ancestors([core], stop=is_projection):
            if is_projection(node):
                ends |= {i for i in node.all_input_nodes if i.op != "get_attr"}
    nodes = ancestors([last, core], stop=lambda n: n in ends)
    return [n for n in core.graph.nodes if n in nodes]


def _way_out(core: fx.Node) -> fx.Node:
    """The last node behind a core with one reader each, a projection at most."""
    node = core
    for _ in range(12):
        if len(node.users) != 1 or next(iter(node.users)).op == "output":
            break
        node = next(iter(node.users))
        if is_projection(node):
            break
    return node


def rows(nodes: Iterable[fx.Node], names: dict[str, str]) -> list[Row]:
    """Nodes as plain text; weights stand where they are read, sizes and numbers are left out.

    Args:
        nodes: in graph order.
        names: letters for the symbols of sizes.
    """
    return [
        Row(n.name, call_of(n), _inputs(n), shape(n, names), path_of(n))
        for n in nodes
        if isinstance(n.meta.get("val"), Tensor) and n.op != "get_attr"
    ][:MOST]


def _inputs(node: fx.Node) -> tuple[str, ...]:
    """Tensors a node reads; weights by the end of their path."""
    return tuple(
        ".".join(str(i.target).split(".")[-2:]) if i.op == "get_attr" else i.name
        for i in node.all_input_nodes
        if i.op == "get_attr" or isinstance(i.meta.get("val"), Tensor)
    )


def letters(captured: Capture) -> dict[str, str]:
    """B and N for the symbols that stand for batch and length in a graph, L, K .. for others."""
    known: dict[str, str] = {}
    for node, value in captured.placeholders().items():
        symbols = node.meta.get("val")
        if not isinstance(symbols, Tensor) or not isinstance(value, Tensor):
            continue
        for symbol, size in zip(symbols.shape, value.shape, strict=True):
            if str(symbol).isdigit() or str(symbol) in known:
                continue
            rest = (c for c in "LKJIHGFE" if c not in known.values())
            letter = next((n for n, s in captured.sizes.items() if s == size), None)
            known[str(symbol)] = letter or next(rest, str(symbol))
    return known


def call_of(node: fx.Node) -> str:
    """The operation, by its short name."""
    if node.op == "placeholder":
        return "input"
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rpartition(".")[2]


def shape(node: fx.Node, names: dict[str, str]) -> str:
    """Sizes and dtype of a node's value."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = " ".join(re.sub(r"s\d+", lambda m: names.get(m[0], m[0]), str(s)) for s in value.shape)
    return f"[{sizes}] {str(value.dtype).removeprefix('torch.')}"
