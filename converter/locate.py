"""Who owns a block, and how the owner's call maps to a mixer's: found by running, by value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.capture import Call, Capture, watch
from reattend.install.adapter import Adapter
from reattend.install.binding import (
    Binding,
    bound,
    match,
    match_hiding,
    match_mask,
    match_output,
    match_table,
    returns_bias,
)
from reattend.install.unmasked import unmasked
from reattend.mixers.relative import relative_bias
from reattend.passes.evaluate import ancestors, attribute
from reattend.passes.find.owners import owner_of
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.spec import Added, Alibi, RelativeBias, Rotary, Stream
from reattend.weights import head_order

#: (owner path, binding or None, why there is none)
Place = tuple[str, Binding | None, str]


def adapter_of(path: str, ours: dict[str, Adapter]) -> str | None:
    """The converted block that `path` lies in."""
    return next((p for p in ours if path == p or path.startswith(p + ".")), None)


def locate(captured: Capture, found: list[Found]) -> dict[int, tuple[str, Binding | None, str]]:
    """Owner and binding of every found block, or the reason it has none."""
    owners = {id(f): [owner_of(f.region.nodes), owner_of(f.region.nodes[:4])] for f in found}
    paths = {p for pair in owners.values() for p in pair if p}
    inputs = captured.probe(padded=True, side=slice(-3, None))
    calls = watch(captured.model, paths, inputs)
    cached = _watch_cache(captured.model, paths, captured.inputs)
    wanted = [n for f in found for n in _boundary(f)]
    values = captured.values(wanted, inputs)
    located: dict[int, tuple[str, Binding | None, str]] = {}
    ours = {p: m for p, m in captured.model.named_modules() if isinstance(m, Adapter)}
    for item in found:
        whole, inner = owners[id(item)]
        own = adapter_of(inner, ours)
        if own is not None:
            if item.region.rotation is not None:
                _exact_frequencies(captured, item)
            located[id(item)] = (own, ours[own].binding, "")
            continue
        path, binding, reasons = whole, None, ["no submodule holds exactly this block"]
        for candidate, stop in ((whole, False), (inner, True)):
            if candidate not in calls or (stop and item.region.exit.out is None):
                continue
            try:
                binding = _bind(captured, item, candidate, calls[candidate], values, cached, stop)
            except NotUnderstood as why:
                reasons.append(str(why))
                continue
            path = candidate
            if stop:
                item.region.exit.node, item.region.exit.out = item.region.exit.joined, None
                item.spec = replace(item.spec, out=None)
            break
        located[id(item)] = (path, binding, reasons[min(1, len(reasons) - 1)])
    return located


def _boundary(item: Found) -> list[fx.Node]:
    region = item.region
    nodes = [region.hidden, region.memory, region.mask, region.exit.node, region.exit.joined]
    nodes += region.extras
    return [n for n in nodes if n is not None]


def _bind(
    captured: Capture,
    item: Found,
    path: str,
    call: Call,
    values: dict[fx.Node, Any],
    cached: dict[str, tuple[Any, ...]],
    stop: bool,
) -> Binding:
    """Match the region's boundary with the owner's arguments and result, by value."""
    region = item.region
    arguments = bound(captured.model.get_submodule(path), call.args, call.kwargs)
    hidden = match(arguments, values[region.hidden])
    if hidden is None:
        raise NotUnderstood(f"{path or 'the model'} does not receive the block's input")
    memory = None
    if region.memory is not None:
        memory = match(arguments, values[region.memory])
        if memory is None:
            raise NotUnderstood(f"{path} does not receive the block's encoder states")
    exit_node = region.exit.joined if stop else region.exit.node
    bias = _added(captured, item, values)
    output = match_output(call.output, values[exit_node], arguments, bias)
    if output is None:
        raise NotUnderstood(f"{path or 'the model'} returns something else than the block's output")
    if returns_bias(output) and head_order(item.spec)[0] != list(range(item.spec.core.heads)):
        raise NotUnderstood(f"{path} returns its position bias in another order of heads")
    mask, adds, hides = None, False, False
    if region.mask is not None:
        mask, adds = match_mask(arguments, values[region.mask])
        if mask is None:
            mask = match_hiding(arguments, values[region.mask])
            hides = mask is not None
    opaque = item.spec.core.pattern.kind == "opaque"
    if region.mask is not None and mask is None and (item.follows_padding or opaque):
        does = "decides what is seen" if opaque else "hides padding"
        raise NotUnderstood(f"{path} does not receive the mask that {does}")
    if opaque and mask is not None and not hides:
        owner = captured.model.get_submodule(path)
        kind = unmasked(owner, call, mask, values[exit_node])
        pattern = replace(item.spec.core.pattern, unmasked=kind)
        item.spec = replace(item.spec, core=replace(item.spec.core, pattern=pattern))
    extras = _bind_extras(item, path, arguments, values, path in cached)
    cos = sin = position = None
    if region.rotation is not None:
        cos, sin, position = _bind_rotation(captured, item, arguments)
    cache, part, layer_idx = cached.get(path, (None, None, 0))
    return Binding(
        hidden=hidden, memory=memory, mask=mask,
        mask_adds_bias=adds and isinstance(item.spec.core.bias, RelativeBias | Alibi),
        cos=cos, sin=sin, position=position,
        cache=cache, cache_part=part, layer_idx=layer_idx, output=output,
        extras=extras, mask_hides=hides,
    )  # fmt: skip


def _bind_extras(
    item: Found, path: str, arguments: dict[str, Any], values: dict[fx.Node, Any], caches: bool
) -> tuple[Any, ...]:
    """Where the owner receives what its own steps read beside the hidden state."""
    if caches and isinstance(item.spec.core.bias, Added):
        raise NotUnderstood(
            f"{path} adds to its scores what it computes from the tokens of one call, which cached "
            f"decoding does not have"
        )
    found = [match(arguments, values[node]) for node in item.region.extras]
    for node, place in zip(item.region.extras, found, strict=True):
        if place is None:
            raise NotUnderstood(f"{path} does not receive {node.name}, which the block reads")
    return tuple(found)


def _added(captured: Capture, item: Found, values: dict[fx.Node, Any]) -> Tensor:
    """What the block adds to its scores, [1, H, N, M]; zeros without a position bias."""
    core, region = item.spec.core, item.region
    n = values[region.hidden].shape[1]
    m = n if region.memory is None else values[region.memory].shape[1]
    if not isinstance(core.bias, RelativeBias):
        return values[region.hidden].new_zeros(1, core.heads, n, m)
    table = attribute(captured.gm, core.bias.weight).detach()
    return relative_bias(table, core.bias.buckets, n, m)


def _bind_rotation(
    captured: Capture, item: Found, arguments: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """The model's own tables where the owner receives them, else positions, else inv_freq."""
    rotation = item.region.rotation
    assert rotation is not None and rotation.spec is not None
    cos = match_table(arguments, rotation.cos_NP)
    sin = match_table(arguments, rotation.sin_NP)
    _exact_frequencies(captured, item)
    if cos is not None and sin is not None:
        if abs(cos[1] - 1) > 1e-4 or abs(sin[1] - 1) > 1e-4:
            raise NotUnderstood(f"the stream scales the model's rotary table by {cos[1]:g}")
        return cos[0], sin[0], None
    positions = torch.arange(rotation.cos_NP.shape[0])
    for batch in (1, captured.sizes.get("B", 1)):
        path = match(arguments, positions.expand(batch, -1))
        if path is not None:
            return None, None, path
    return None, None, None


def _exact_frequencies(captured: Capture, item: Found) -> None:
    """Replace fitted frequencies by the stored tensor they came from, where one matches."""
    region = item.region
    assert region.rotation is not None and region.rotation.spec is not None
    fitted = torch.tensor(region.rotation.spec.inv_freq, dtype=torch.float64)
    for node in ancestors(region.externals):
        if node.op != "get_attr":
            continue
        value = attribute(captured.gm, str(node.target))
        if not isinstance(value, Tensor) or value.dim() != 1 or value.numel() != fitted.numel():
            continue
        exact = value.double().cpu()
        if bool(((exact - fitted).abs() <= 1e-4 * fitted.abs().clamp_min(1e-6)).all()):
            frequencies = tuple(float(v) for v in exact)
            q, k = item.spec.q, item.spec.k
            item.spec = replace(
                item.spec,
                q=_with_frequencies(q, frequencies),
                k=_with_frequencies(k, frequencies),
            )
            return


def _with_frequencies(stream: Stream, frequencies: tuple[float, ...]) -> Stream:
    steps = tuple(
        replace(s, inv_freq=frequencies) if isinstance(s, Rotary) else s for s in stream.steps
    )
    return replace(stream, steps=steps)


def _watch_cache(
    model: nn.Module, paths: set[str], inputs: dict[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """path -> (leaf of the call that is the cache, its part, layer index), by running once.

    Empty for models without a transformers cache.
    """
    if inputs.get("use_cache") is not False or not hasattr(model, "config"):
        return {}
    from reattend.install.caching import watch_cache

    return watch_cache(model, paths, inputs)
