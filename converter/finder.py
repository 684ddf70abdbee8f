"""find_attention: capture, normalise, find, prove, and locate the owner of every site."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from reattend.callcheck import call_check, mask_of
from reattend.capture import Capture, capture, one_length, tokens_first
from reattend.frame import dropouts
from reattend.host import inputs_on_host, on_host
from reattend.inputs import is_hf
from reattend.install.adapter import Adapter
from reattend.install.binding import Binding
from reattend.locate import Place, adapter_of, locate
from reattend.overlooked import unaccounted
from reattend.ownercheck import Watched, owner_check
from reattend.passes.base import CORES, PassResult
from reattend.passes.find.latent import LatentForm, read_latent
from reattend.passes.find.owners import owner_of, path_of
from reattend.passes.find.sites import Found, Missed, Region, find
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op
from reattend.selfcheck import self_check
from reattend.spec import Added, AttentionSpec, Joined, Opaque
from reattend.surround import Surrounding


@dataclass
class AttentionSite:
    """One attention block of a model.

    Attributes:
        path: dotted path of the module it lies in (`#k` appended where that holds several). A
            module that is called several times is one site.
        spec: what it computes.
        verified: it passed the self-check (`error` is its relative error in float64).
        hidden_size, memory_size: input widths; memory 0 for self-attention.
        owner: `module` if a submodule is exactly this block, else `graph`.
        binding: how the owning module's call maps to a mixer's; None for `graph`.
        region: the block in the captured graph.
        follows_padding: the model's own mask hides padded tokens here.
        surrounding: what the owner does besides the block, None where it is exactly the block.
        cores: softmax cores of one run of the model that it stands for: two where a block weighs
            its values in two calls, and those of every call of the module.
    """

    path: str
    spec: AttentionSpec
    verified: bool
    error: float
    hidden_size: int
    memory_size: int
    owner: Literal["module", "graph"]
    binding: Binding | None
    region: Region = field(repr=False)
    follows_padding: bool = False
    surrounding: Surrounding | None = field(default=None, repr=False)
    cores: int = 1


@dataclass
class RefusedSite:
    """A core that was seen but not understood, or not provable.

    `latent` holds the sizes of a block that already is multi-head latent attention. `verified`: it
    was understood and passed the self-check (a latent one read as keys and values of full width),
    and is refused for where it lives or what it is.
    """

    path: str
    reason: str
    latent: LatentForm | None = None
    verified: bool = False


@dataclass
class FoundAttention:
    """Everything `find_attention` saw, and the capture it was seen in."""

    capture: Capture = field(repr=False)
    sites: list[AttentionSite] = field(default_factory=list)
    refused: list[RefusedSite] = field(default_factory=list)


def find_attention(model: nn.Module, inputs: dict[str, Any] | None = None) -> FoundAttention:
    """Find, understand and prove the attention blocks of a model.

    Args:
        model: any module torch.export can capture; not changed. One that is not on the CPU is
            read through a copy there.
        inputs: example keyword arguments, batch and length >= 2 and distinct; None makes them
            up for transformers models.

    Raises:
        CaptureError: the model cannot be captured.
        ArgumentError: inputs are needed.
    """
    model = on_host(model)
    captured = capture(model, inputs_on_host(inputs))
    drops = dropouts(captured.gm)
    passes = normalize(captured.gm)
    first = next((n for n in captured.gm.graph.nodes if is_op(n, attention)), None)
    if first is not None:
        tokens_first(captured, first)

    def inputs_at(length: int | None, padded: bool) -> dict[fx.Node, Any]:
        return captured.placeholders(captured.probe(length, padded))

    result = FoundAttention(captured)
    seen = find(captured.gm, captured.placeholders(), inputs_at)
    places = locate(captured, [f for f in seen if isinstance(f, Found)], drops)
    ours = {p: m for p, m in model.named_modules() if isinstance(m, Adapter)}
    whole = is_hf(model) or bool(captured.left_out)  # its graph cannot take its place
    watched = Watched(captured, {p.path for p in places.values() if p.binding is not None})
    for item in seen:
        if isinstance(item, Missed):
            result.refused.append(_missed(item, ours))
            continue
        place = places[id(item)]
        latent = read_latent(item.region.core) if _own_steps(item.spec) else None
        if latent is not None:
            proven = not self_check(captured.gm, item, inputs_at).reason
            result.refused.append(RefusedSite(place.path, latent.reason, latent, proven))
            continue
        if place.path in ours and ours[place.path].mixer.kind != "dense":
            already = _already(place.path, ours[place.path])  # a dense group of a mixed block
            result.refused.append(already)
            continue
        if place.binding is None and whole:
            proven = not self_check(captured.gm, item, inputs_at).reason
            result.refused.append(RefusedSite(place.path, place.reason, verified=proven))
            continue
        cached = place.binding is not None and place.binding.cache is not None
        try:
            proof = self_check(captured.gm, item, inputs_at, cached)
        except RuntimeError as problem:
            first_line = (str(problem).splitlines() or [""])[0][:120]
            reason = f"not understood: the rebuilt block cannot be run: {first_line}"
            result.refused.append(RefusedSite(place.path, reason))
            continue
        if proof.reason:
            result.refused.append(RefusedSite(place.path, proof.reason))
            continue
        if place.binding is not None and _carries_steps(item, place):
            length = one_length(captured, item.region.hidden)
            if length:
                result.refused.append(RefusedSite(place.path, _fixed(length)))
                continue
        if place.surrounding is not None and not place.number:
            reason = owner_check(watched, item, place)
            if reason and whole:
                result.refused.append(RefusedSite(place.path, reason))
                continue
            if reason:
                place = Place(place.path, reason=reason)
        if place.binding is not None and not place.surrounding and place.path not in ours:
            reason = "" if place.number else _misread(watched, item, place)
            if reason:
                result.refused.append(RefusedSite(place.path, reason))
                continue
        if place.number and place.binding is not None:
            reason = _differs(item, place, result.sites)
            same = [s for s in result.sites if s.path == place.path]
            if reason:  # nor can the calls before: they are one module
                result.sites = [s for s in result.sites if s not in same]
                calls = sum(s.cores for s in same) + _cores(item)
                result.refused += [RefusedSite(place.path, reason)] * calls
            for site in () if reason else same:
                site.cores += _cores(item)
            continue
        result.sites.append(_site(item, place, proof.error))
    result.refused += _refused_cores(captured.gm, passes)
    missing = unaccounted(captured, _told(result), ours)
    result.refused += [RefusedSite(path, reason) for path, reason in missing]
    result.refused = _once(result.refused, ours)
    _number(result.sites)
    return result


def _carries_steps(item: Found, place: Place) -> bool:
    """Whether the model's own operations stay around or inside the block."""
    spec = item.spec
    own = any(isinstance(s.proj, Opaque) for s in (spec.q, spec.k, spec.v))
    own = own or isinstance(spec.join, Joined) or isinstance(spec.core.bias, Added)
    return own or place.surrounding is not None


def _fixed(length: int) -> str:
    return (
        f"torch.export follows this model at one length only ({length} tokens), so what the block "
        f"does beside attention is not known at others"
    )


def _misread(watched: Watched, item: Found, place: Place) -> str:
    """Why the binding of an owner that is exactly its block is wrong; empty if it is right."""
    inputs = watched.inputs(None, True)
    mask = mask_of(watched.captured, item, inputs)
    return call_check(watched.captured, item, place, watched.call(place.path, None, True), mask)


def _told(result: FoundAttention) -> Counter[str]:
    """Cores that were found or refused, by path of a module they ran in."""
    told = Counter(r.path for r in result.refused)
    for site in result.sites:
        ran = path_of(site.region.core)  # another, where one takes the weights of many
        told[site.path if f"{ran}.".startswith(f"{site.path}.") else ran] += site.cores
    return told


def _own_steps(spec: AttentionSpec) -> bool:
    """Whether keys or values are made by the model's own steps, as those of a latent block are."""
    return any(isinstance(s.proj, Opaque) for s in (spec.k, spec.v))


def _differs(item: Found, place: Place, sites: list[AttentionSite]) -> str:
    """Why a block that is called again cannot share its first call's mixer; empty if it can."""
    first = next((s for s in sites if s.path == place.path), None)
    if first is None or first.spec != item.spec or first.binding != place.binding:
        return f"{place.path} is called several times and does not do the same each time"
    if first.binding is not None and first.binding.cache and not first.binding.layer_shift:
        return f"{place.path} is called several times, and each call writes to the same cache"
    return ""


def _site(item: Found, place: Place, error: float) -> AttentionSite:
    memory = item.region.memory
    return AttentionSite(
        path=place.path,
        spec=item.spec,
        verified=True,
        error=error,
        hidden_size=int(item.region.hidden.meta["val"].shape[-1]),
        memory_size=0 if memory is None else int(memory.meta["val"].shape[-1]),
        owner="module" if place.binding is not None else "graph",
        binding=place.binding,
        surrounding=place.surrounding,
        region=item.region,
        follows_padding=item.follows_padding,
        cores=_cores(item),
    )


def _cores(item: Found) -> int:
    return int(item.region.core.meta.get(CORES, 1))


def _number(sites: list[AttentionSite]) -> None:
    """Several blocks in one module get `#0`, `#1` ... in graph order."""
    counts = Counter(s.path for s in sites)
    seen: Counter[str] = Counter()
    for site in sites:
        path = site.path
        if counts[path] > 1:
            site.path = f"{path}#{seen[path]}"
            seen[path] += 1


def _missed(item: Missed, ours: dict[str, Adapter]) -> RefusedSite:
    path = owner_of([item.core])
    own = adapter_of(path, ours)
    if own is not None and ours[own].mixer.kind != "dense":
        return _already(own, ours[own])
    latent = read_latent(item.core)
    if latent is not None:
        return RefusedSite(own or path, latent.reason, latent)
    return RefusedSite(own or path, item.reason)


def _already(path: str, block: Adapter) -> RefusedSite:
    """A block that an earlier conversion replaced."""
    return RefusedSite(path, f"already {block.mixer.kind}")


def _once(refused: list[RefusedSite], ours: dict[str, Adapter]) -> list[RefusedSite]:
    """The cores of one converted block (head groups) are one refusal."""
    return [r for i, r in enumerate(refused) if r.path not in ours or r not in refused[:i]]


def _refused_cores(gm: fx.GraphModule, passes: list[PassResult]) -> list[RefusedSite]:
    """What looked like a core and was not taken by the passes that normalise cores."""
    nodes = {n.name: n for n in gm.graph.nodes}
    return [
        RefusedSite(owner_of([nodes[name]]) if name in nodes else name, reason)
        for step in passes
        if step.name in ("fuse-sdpa", "fuse-eager")
        for name, reason in step.refused
    ]
