"""Blocks whose streams come from different tensors, or whose scores add more than a mask.

What the owner's call receives beside the hidden state (position embeddings, values of their own, a
window's mask) is an *extra*: the model's own steps take it as a further input.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from reattend.passes.find.opaque import opaque_step
from reattend.passes.find.owners import from_outside, owner_of
from reattend.passes.find.programs import cut_out
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.streams import FoundStream
from reattend.spec import Added, Opaque


@dataclass
class Sources:
    """What a block reads: `hidden` for queries, `memory` for keys and values, `extras` beside."""

    hidden: fx.Node
    memory: fx.Node | None
    extras: list[fx.Node] = field(default_factory=list)

    def place(self, node: fx.Node) -> int:
        """The number of an extra."""
        if node not in self.extras:
            self.extras.append(node)
        return self.extras.index(node)


def read_sources(
    gm: fx.GraphModule, core: fx.Node, streams: dict[str, FoundStream]
) -> tuple[Sources, dict[str, FoundStream]]:
    """The sources of q, k and v; streams that need more than one begin with the model's own steps.

    Raises:
        NotUnderstood: a stream's beginning depends on something that is not a tensor of the call.
    """
    q, k, v = (streams[n] for n in "qkv")
    plain = all(s.hidden.meta["val"].dim() == 3 for s in (q, k, v))
    owner = owner_of([*own_projections(streams), core])
    alone = not any(s.carried or _reads_more(s, owner) for s in streams.values())
    if k.hidden is v.hidden and plain and alone:
        return Sources(q.hidden, None if k.hidden is q.hidden else k.hidden), streams
    behind = {n: from_outside(_end(s), owner) for n, s in streams.items()}
    if not all(behind.values()):
        raise NotUnderstood("keys and values come from different tensors")
    shared = [n for n in behind["q"] if n in behind["v"]]
    hidden = q.hidden if q.hidden in behind["q"] else _states(shared or behind["q"])
    both = [n for n in behind["k"] if n in behind["v"]]
    memory = hidden
    if hidden not in behind["v"] and not v.site:
        memory = k.hidden if k.hidden in behind["k"] else _states(both or behind["k"])
    sources = Sources(hidden, None if memory is hidden else memory)
    made = {
        name: _based(gm, stream, hidden if name == "q" else memory, behind[name], sources)
        for name, stream in streams.items()
    }
    return sources, made


def own_projections(streams: dict[str, FoundStream]) -> list[fx.Node]:
    """Where the streams begin that are not another block's."""
    return [s.projection for s in streams.values() if not s.site]


def _end(stream: FoundStream) -> fx.Node:
    """What a stream's sources are looked for behind: its input, or the end of its own steps."""
    return stream.projection if isinstance(stream.steps[0], Opaque) else stream.hidden


def _reads_more(stream: FoundStream, owner: str) -> bool:
    """Whether own steps read more that the call hands over, as factors by position."""
    if not isinstance(stream.steps[0], Opaque):
        return False
    beside = from_outside(stream.projection, owner, (stream.hidden,))
    return bool(beside) or len(from_outside(stream.hidden, owner)) > 1


def _states(candidates: list[fx.Node]) -> fx.Node:
    """The last one that holds a vector for every token; the last one where none does."""
    wide = [n for n in candidates if n.meta["val"].dim() == 3 and n.meta["val"].is_floating_point()]
    return (wide or candidates)[-1]


def _based(
    gm: fx.GraphModule,
    stream: FoundStream,
    source: fx.Node,
    behind: list[fx.Node],
    sources: Sources,
) -> FoundStream:
    """The stream as it begins at `source`."""
    if stream.hidden is source and behind == [source]:
        return stream
    if stream.hidden is source and not isinstance(stream.steps[0], Opaque):
        return stream
    extras = [n for n in behind if n is not source]
    places = tuple(sources.place(n) for n in extras)
    names = {source: "x", **{n: f"e{i}" for i, n in enumerate(extras)}}
    first = stream.steps[0]
    rows = (first.heads, first.rows)  # type: ignore[union-attr]
    step = opaque_step(gm, names, stream.projection, stream.heads_first, rows)
    made = replace(step, extras=places)
    assert isinstance(made, Opaque)
    return replace(stream, hidden=source, steps=(made, *stream.steps[1:]))


def read_added(
    gm: fx.GraphModule, core: fx.Node, streams: dict[str, FoundStream], sources: Sources
) -> Added:
    """What a core adds to its scores, as the model computes it from its call and its weights.

    Raises:
        NotUnderstood: it depends on something that is not a tensor of the call.
    """
    mask = core.args[3]
    assert isinstance(mask, fx.Node)
    owner = owner_of([*own_projections(streams), core])
    extras = [n for n in from_outside(mask, owner) if n is not sources.hidden]
    places = tuple(sources.place(n) for n in extras)
    names = {sources.hidden: "x", **{n: f"e{i}" for i, n in enumerate(extras)}}
    part = cut_out(gm, mask, names, "what is added to the scores")
    return Added(part.program, part.sources, places)
