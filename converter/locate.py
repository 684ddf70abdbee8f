"""Who owns a block, and how the owner's call maps to a mixer's: found by running, by value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.bind import bind, bind_around, boundary
from reattend.capture import Call, Capture, watch_all
from reattend.frame import Frame, call_number, frame
from reattend.frequencies import exact_frequencies
from reattend.install.adapter import Adapter
from reattend.install.binding import Binding, equal, unmatched
from reattend.install.pieces import CacheAt
from reattend.passes.base import path_of
from reattend.passes.find.owners import owner_of
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.passes.find.sources import own_projections
from reattend.stepcheck import stepwise
from reattend.surround import Surrounding, filled


@dataclass
class Place:
    """Where a block lives.

    Attributes:
        path: of its owner.
        binding: how the owner's call maps to a mixer's; None: no submodule carries the block.
        reason: why there is none.
        surrounding: what the owner does besides the block.
        number: of the owner's call that holds the block; above 0 the owner is called again.
    """

    path: str
    binding: Binding | None = None
    reason: str = ""
    surrounding: Surrounding | None = None
    number: int = 0


@dataclass
class _Candidate:
    """A call of a module that may own a block. `stop`: it ends before the output projection."""

    item: Found
    path: str
    stop: bool
    number: int
    direct: Binding | None = None
    place: Frame | None = None
    reasons: list[str] = field(default_factory=list)


def adapter_of(path: str, ours: dict[str, Adapter]) -> str | None:
    """The converted block that `path` lies in."""
    return next((p for p in ours if path == p or path.startswith(p + ".")), None)


def locate(captured: Capture, found: list[Found], drops: set[str]) -> dict[int, Place]:
    """Owner and binding of every found block, or the reason it has none.

    Args:
        captured: the normalised graph.
        found: blocks in it.
        drops: paths of modules with a dropout that acts while training.
    """
    if not found:
        return {}
    owners = {id(f): _candidates(f) for f in found}
    paths = {c.path for many in owners.values() for c in many}
    inputs = captured.probe(padded=True, side=slice(-3, None))
    calls = watch_all(captured.model, paths, inputs)
    cached = _watch_cache(captured.model, paths, captured.inputs)
    values = captured.values([n for f in found for n in boundary(f)], inputs)
    located: dict[int, Place] = {}
    open_: list[_Candidate] = []
    ours = {p: m for p, m in captured.model.named_modules() if isinstance(m, Adapter)}
    for item in found:
        inner = owner_of(item.region.inner)
        own = adapter_of(inner, ours)
        if own is not None:
            if item.region.rotation is not None:
                exact_frequencies(captured, item)
            located[id(item)] = Place(own, ours[own].binding)
            continue
        where = owner_of(item.region.nodes) or owner_of(own_projections(item.region.streams))
        located[id(item)] = Place(where, reason="no submodule holds exactly this block")
        candidates = [c for c in owners[id(item)] if c.number < len(calls.get(c.path, ()))]
        for c in candidates:
            try:
                cache = cached.get(c.path, CacheAt())
                call = calls[c.path][c.number]
                binding = bind(captured, item, c.path, call, values, cache, c.stop)
            except NotUnderstood as why:
                c.reasons.append(str(why))
                continue
            if unmatched(binding.output, call.output):
                c.direct = binding  # attention weights, or something that is read
            else:
                _settle(captured, located, values, c, Place(c.path, binding, number=c.number))
            break
        if located[id(item)].binding is None:
            open_ += candidates
    _surround(captured, open_, located, calls, cached, inputs, drops)
    return located


def _candidates(item: Found) -> list[_Candidate]:
    """The smallest module around the block, and the one around all but its output projection."""
    whole, inner = owner_of(item.region.nodes), owner_of(item.region.inner)
    core = item.region.core
    both = [_Candidate(item, whole, False, call_number(core, whole))]
    if item.region.exit.out is not None:
        both.append(_Candidate(item, inner, True, call_number(core, inner)))
    return [c for c in both if c.path]


def _settle(
    captured: Capture, located: dict[int, Place], values: dict[fx.Node, Any], c: _Candidate,
    place: Place,
) -> None:  # fmt: skip
    """Accept an owner; where it ends before the output projection, so does the block."""
    if c.stop:
        spec, exit_ = c.item.spec, c.item.region.exit
        assert place.binding is not None
        told = {"projection": _projection(captured, c.item, values)}
        place.binding = place.binding.model_copy(update=told)
        exit_.node, exit_.out = exit_.joined, None
        c.item.spec = replace(spec, out=None)
    located[id(c.item)] = place


def _projection(captured: Capture, item: Found, values: dict[fx.Node, Any]) -> str:
    """Path of the module that is a block's output projection and nothing else, or empty."""
    exit_ = item.region.exit
    path = path_of(exit_.node)
    assert exit_.out is not None
    if exit_.out.weight != f"{path}.weight":
        return ""
    with torch.no_grad():
        made = captured.model.get_submodule(path)(values[exit_.joined])
    return path if isinstance(made, Tensor) and equal(made, values[exit_.node]) else ""


def _surround(
    captured: Capture,
    candidates: list[_Candidate],
    located: dict[int, Place],
    calls: dict[str, list[Call]],
    cached: dict[str, CacheAt],
    inputs: dict[str, Any],
    drops: set[str],
) -> None:
    """Owners that do more than their block: their own graph is kept around the mixer."""
    wanted: set[fx.Node] = set()
    candidates = sorted(candidates, key=lambda c: c.direct is None)
    for c in candidates:
        try:
            c.place = frame(captured.gm, c.item.region.core, c.path)
        except NotUnderstood as why:
            c.reasons.append(str(why))
            continue
        wanted |= {*c.place.entries, *c.place.exits, *boundary(c.item), *c.item.region.externals}
    values = captured.values(list(wanted), inputs)
    for c in candidates:
        if located[id(c.item)].binding is not None or c.place is None:
            continue
        call = calls[c.path][c.number]
        if c.direct is not None and not _escape(captured, c, call, values):
            _settle(captured, located, values, c, Place(c.path, c.direct, number=c.number))
            continue
        try:
            binding, surrounding = bind_around(
                captured, c.item, c.place, call, values,
                cached.get(c.path, CacheAt()), c.stop, c.path in drops,
            )  # fmt: skip
        except NotUnderstood as why:
            c.reasons.append(str(why))
            continue
        place = Place(c.path, binding, "", surrounding, c.number)
        _settle(captured, located, values, c, place)
    _check_steps(captured, [p for p in located.values() if p.surrounding is not None])
    for c in reversed(candidates):
        if located[id(c.item)].binding is None and c.reasons:
            located[id(c.item)] = Place(c.path, reason=c.reasons[-1])


def _escape(captured: Capture, c: _Candidate, call: Call, values: dict[fx.Node, Any]) -> bool:
    """Whether a returned tensor that the mixer does not make is a weight, or is read outside."""
    assert c.direct is not None and c.place is not None
    rest = unmatched(c.direct.output, call.output)
    own = list(captured.model.get_submodule(c.path).parameters())
    if any(tensor is weight for tensor in rest for weight in own):
        return True
    return any(equal(tensor, values[node]) for node in c.place.exits for tensor in rest)


def _check_steps(captured: Capture, places: list[Place]) -> None:
    """Note which owners cannot run from a cache."""
    cached = [p for p in places if p.binding is not None and p.binding.cache is not None]
    if not cached:
        return
    from reattend.install.caching import watch_steps

    steps = watch_steps(captured.model, {p.path for p in cached}, captured.inputs)
    tensors: dict[str, Tensor] = dict(captured.model.named_parameters(remove_duplicate=False))
    tensors |= dict(captured.model.named_buffers(remove_duplicate=False))
    for p in cached:
        assert p.binding is not None and p.surrounding is not None
        around = filled(p.surrounding, lambda name: tensors[name].detach()).double()
        width = p.surrounding.width
        if steps is None or not stepwise(captured.model, p.path, p.binding, around, width, steps):
            config = p.surrounding.config.model_copy(update={"stepwise": False})
            p.binding = p.binding.model_copy(update={"around": config})


def _watch_cache(model: nn.Module, paths: set[str], inputs: dict[str, Any]) -> dict[str, CacheAt]:
    """path -> where its cache is, by running once.

    Empty for models without a transformers cache.
    """
    writes = getattr(model, "can_generate", None)  # some take `use_cache` without naming it
    asked = inputs.get("use_cache", not (writes is not None and writes()))
    if asked is not False or not hasattr(model, "config"):
        return {}
    from reattend.install.caching import watch_cache

    return watch_cache(model, paths, inputs)
