"""Find every attention block of a captured model and read its spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from reattend.passes.find.exits import FoundExit, read_exit
from reattend.passes.find.joins import own_join
from reattend.passes.find.masks import FoundMask, read_mask
from reattend.passes.find.owners import from_outside, owner_of
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.rotary import Rotation
from reattend.passes.find.shared import handed_on, read_shared
from reattend.passes.find.sources import Sources, own_projections, read_added, read_sources
from reattend.passes.find.stored import stored_steps
from reattend.passes.find.streams import FoundStream, read_carried, read_stream
from reattend.passes.find.twins import twin
from reattend.passes.normalize.forms import attention, is_op
from reattend.passes.normalize.sinks import stored_name
from reattend.spec import Added, AttentionSpec, Core, Pattern, Rotary, Stream


@dataclass
class Region:
    """A block in the graph: its nodes, what enters, what leaves.

    `handed`: its keys (`k`) and values (`v`) where other blocks read them. `position`: what a
    factor of its queries is made of, where that comes from outside.
    """

    core: fx.Node
    hidden: fx.Node
    memory: fx.Node | None
    mask: fx.Node | None
    exit: FoundExit
    streams: dict[str, FoundStream]
    rotation: Rotation | None
    externals: list[fx.Node] = field(default_factory=list)
    extras: list[fx.Node] = field(default_factory=list)
    handed: dict[str, fx.Node] = field(default_factory=dict)
    position: fx.Node | None = None

    @property
    def inner(self) -> list[fx.Node]:
        """Every projection of its own, and the core."""
        return [*own_projections(self.streams), self.core]

    @property
    def nodes(self) -> list[fx.Node]:
        """The same with the exit: enough to tell which module owns the block."""
        return self.inner + ([self.exit.node] if self.exit.out is not None else [])

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """Another node stands for one that enters here."""
        self.hidden = new if self.hidden is old else self.hidden
        self.memory = new if self.memory is old else self.memory


@dataclass
class Found:
    """One block that was understood. `twin`: because its graph equals one that was read."""

    spec: AttentionSpec
    region: Region
    follows_padding: bool
    twin: bool = False


@dataclass
class Missed:
    """One core that was not."""

    core: fx.Node
    reason: str


def find(
    gm: fx.GraphModule,
    given: dict[fx.Node, Any],
    inputs_at: Callable[[int | None, bool], dict[fx.Node, Any]],
) -> list[Found | Missed]:
    """Read every core of a normalised graph, in graph order.

    Args:
        gm: normalised graph.
        given: placeholder values the graph was captured with.
        inputs_at: (length or None, padded) -> placeholder values, for probing masks.
    """
    results: list[Found | Missed] = []
    masks: dict[tuple[fx.Node | None, bool], FoundMask | NotUnderstood] = {}

    def mask_of(node: fx.Node | None, is_causal: bool) -> FoundMask:
        key = (node, is_causal)
        if key not in masks:
            try:
                masks[key] = read_mask(gm, node, is_causal, inputs_at)
            except NotUnderstood as reason:
                masks[key] = reason
        value = masks[key]
        if isinstance(value, NotUnderstood):
            raise value
        return value

    for node in list(gm.graph.nodes):
        if is_op(node, attention):
            read = (r for r in results if isinstance(r, Found) and not r.twin)
            again = next(filter(None, (twin(gm, r, node) for r in read)), None)
            if again is not None:
                results.append(again)
                continue
            try:
                results.append(_read(gm, node, given, mask_of))
            except NotUnderstood as reason:
                results.append(Missed(node, str(reason)))
            except RuntimeError as problem:  # an op that only runs inside its transform (vmap)
                first = (str(problem).splitlines() or [""])[0][:120]
                results.append(Missed(node, f"its mask or tables cannot be run alone: {first}"))
    return results


def _read(
    gm: fx.GraphModule,
    core: fx.Node,
    given: dict[fx.Node, Any],
    mask_of: Callable[[fx.Node | None, bool], FoundMask],
) -> Found:
    mask, scale, softcap, _, sinks = core.args[3:]
    sources, streams = read_sources(gm, core, _read_streams(gm, core, given))
    q, k, v = streams["q"], streams["k"], streams["v"]
    hidden, memory = sources.hidden, sources.memory
    rotation = _shared_rotation(q, k)
    found_mask, added = _hidden_or_added(gm, core, streams, sources, mask_of)
    source = "hidden" if memory is None else "encoder"
    spec = AttentionSpec(
        q=Stream("hidden", stored_steps(gm, q.projection, q.steps)),
        k=Stream(_named(k, source), stored_steps(gm, k.projection, k.steps)),
        v=Stream(_named(v, source), stored_steps(gm, v.projection, v.steps)),
        core=replace(
            _core(q, k, v, float(scale), float(softcap or 0.0), found_mask),
            sinks=stored_name(sinks),
            bias=found_mask.bias if added is None else added,
        ),
        out=None,
    )
    owner = owner_of([*own_projections(streams), core])
    exit_ = read_exit(gm, core, hidden, given, owner)
    if exit_.out is None and list(spec.core.kv_head_of) != sorted(spec.core.kv_head_of):
        exit_.join = own_join(gm, core, hidden, exit_.joined)  # heads leave in the model's order
    spec = replace(spec, out=exit_.out, join=exit_.join)
    externals = {e for s in streams.values() for e in s.externals}
    region = Region(
        core, hidden, memory, mask, exit_, streams, rotation,
        sorted(externals, key=list(gm.graph.nodes).index), sources.extras,
        handed_on(core, streams, owner), _position(q, owner),
    )  # fmt: skip
    return Found(spec, region, found_mask.follows_padding)


def _read_streams(
    gm: fx.GraphModule, core: fx.Node, given: dict[fx.Node, Any]
) -> dict[str, FoundStream]:
    """q, k and v; what the spec has no word for is carried as the model's own steps."""
    q_node, k_node, v_node = core.args[:3]
    streams = {"q": read_stream(gm, q_node, given)}
    if _made_outside(streams["q"], core):
        streams["q"] = read_stream(gm, q_node, given, grows=False)
    for which, name, node in ((1, "k", k_node), (2, "v", v_node)):
        streams[name] = read_shared(gm, core, which, given) or read_stream(gm, node, given)
    for name in _turned_alone(streams):
        carried = read_carried(gm, core.args["qkv".index(name)], given)
        if carried is None:
            raise NotUnderstood(f"what is rotated differs between q, k and v ({name} alone)")
        streams[name] = replace(carried, hidden=streams[name].hidden)
    if any(streams[n].growth for n in "kv"):
        raise NotUnderstood("keys or values are multiplied by a factor of position")
    return streams


def _hidden_or_added(
    gm: fx.GraphModule,
    core: fx.Node,
    streams: dict[str, FoundStream],
    sources: Sources,
    mask_of: Callable[[fx.Node | None, bool], FoundMask],
) -> tuple[FoundMask, Added | None]:
    """The mask as a pattern; one of no known kind as what it adds, by the model's own steps."""
    mask, is_causal = core.args[3], core.args[6]
    try:
        found = mask_of(mask, bool(is_causal))
        if sources.memory is not None and found.bias is not None:
            raise NotUnderstood("a relative bias in cross-attention")
    except NotUnderstood as why:
        if is_causal or mask is None:
            raise
        try:
            added = read_added(gm, core, streams, sources)
        except NotUnderstood as also:
            raise NotUnderstood(f"{why}; {also}") from why
        return FoundMask(Pattern("full"), False), added
    return found, None


def _position(q: FoundStream, owner: str) -> fx.Node | None:
    """The positions that enter a block for its queries' factor; None where it counts tokens."""
    outside = [] if q.growth is None else from_outside(q.growth.factor, owner)
    return outside[0] if outside else None


def _made_outside(stream: FoundStream, core: fx.Node) -> bool:
    """Whether a factor by position enters a block finished, and not the positions."""
    if stream.growth is None:
        return False
    owner = owner_of([stream.projection, core])
    outside = from_outside(stream.growth.factor, owner)
    return bool(outside) and outside != from_outside(stream.growth.position, owner)


def _named(stream: FoundStream, source: str) -> str:
    return f"site:{stream.site}" if stream.site else source


def _turned_alone(streams: dict[str, FoundStream]) -> list[str]:
    """Streams whose rotation the spec has no word for: of values, or of queries or keys alone."""
    turned = [n for n in "qkv" if streams[n].rotation is not None]
    alone = [n for n in turned if n != "v"]
    return ["v"] * ("v" in turned) + (alone if len(alone) == 1 else [])


def _shared_rotation(q: FoundStream, k: FoundStream) -> Rotation | None:
    """The rotation of queries and keys, which must be the same one."""
    if (q.rotation is None) != (k.rotation is None):
        raise NotUnderstood("only one of queries and keys is rotated")
    if q.rotation is None or k.rotation is None:
        return None
    a, b = q.rotation, k.rotation
    assert isinstance(a.spec, Rotary) and isinstance(b.spec, Rotary)
    same = a.spec.pairs == b.spec.pairs and a.cos_NP.shape == b.cos_NP.shape
    if (
        not same
        or bool((a.cos_NP - b.cos_NP).abs().max() > 1e-9)
        or bool((a.sin_NP - b.sin_NP).abs().max() > 1e-9)
    ):
        raise NotUnderstood("queries and keys are rotated differently")
    return a


def _core(
    q: FoundStream, k: FoundStream, v: FoundStream, scale: float, softcap: float, mask: FoundMask
) -> Core:
    """Heads and the key/value head each query head reads, from repeated row maps."""
    k_proj, v_proj = k.steps[0], v.steps[0]
    q_proj = q.steps[0]
    k_rows = torch.tensor(k_proj.rows).reshape(k_proj.heads, -1)  # type: ignore[union-attr]
    v_rows = torch.tensor(v_proj.rows).reshape(v_proj.heads, -1)  # type: ignore[union-attr]
    heads = q_proj.heads  # type: ignore[union-attr]
    if k_rows.shape[0] == v_rows.shape[0] == 1:  # one head that meets all by broadcasting
        k_rows, v_rows = k_rows.expand(heads, -1), v_rows.expand(heads, -1)
    if k_rows.shape[0] != heads or v_rows.shape[0] != heads:
        raise NotUnderstood(
            f"{heads} query heads meet {k_rows.shape[0]} key and {v_rows.shape[0]} value heads"
        )
    both = torch.cat([k_rows, v_rows], 1)
    group_of, seen = [], []
    for row in both.tolist():
        if row not in seen:
            seen.append(row)
        group_of.append(seen.index(row))
    if heads % len(seen) or any(group_of.count(g) != heads // len(seen) for g in range(len(seen))):
        seen, group_of = both.tolist(), list(range(heads))  # shared unequally: each its own
    return Core(
        heads=heads,
        kv_heads=len(seen),
        kv_head_of=tuple(group_of),
        qk_head_dim=q_proj.width,  # type: ignore[union-attr]
        v_head_dim=v_proj.width,  # type: ignore[union-attr]
        scale=scale,
        softcap=softcap,
        pattern=mask.pattern,
    )
