"""find_attention: capture, normalise, find, prove, and locate the owner of every site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.capture import Call, Capture, capture, watch
from reattend.inputs import resized
from reattend.install.adapter import Adapter
from reattend.install.binding import Binding, bound, match, match_output, match_table
from reattend.passes.base import PassResult
from reattend.passes.evaluate import Evaluator, ancestors, attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found, Missed, find
from reattend.passes.normalize import normalize
from reattend.selfcheck import TOLERANCE, self_check
from reattend.spec import AttentionSpec, Rotary


@dataclass
class AttentionSite:
    """One attention block of a model.

    Attributes:
        path: dotted path of the module that owns it (`#k` appended where one owns several).
        spec: what it computes.
        verified: it passed the self-check (`error` is its relative error in float64).
        binding: how the owner's call maps to a mixer's.
        hidden_size, memory_size: input widths; memory 0 for self-attention.
    """

    path: str
    spec: AttentionSpec
    verified: bool
    error: float
    binding: Binding
    hidden_size: int
    memory_size: int = 0


@dataclass
class RefusedSite:
    """A core that was seen but not understood, or not provable."""

    path: str
    reason: str


@dataclass
class FoundAttention:
    """Everything `find_attention` saw."""

    sites: list[AttentionSite] = field(default_factory=list)
    refused: list[RefusedSite] = field(default_factory=list)


def find_attention(model: nn.Module, inputs: dict[str, Any] | None = None) -> FoundAttention:
    """Find, understand and prove the attention blocks of a model.

    Args:
        model: any module torch.export can capture; not changed.
        inputs: example keyword arguments, batch and length >= 2 and distinct; None makes them
            up for transformers models.

    Raises:
        CaptureError: the model cannot be captured.
        ArgumentError: inputs are needed.
    """
    captured = capture(model, inputs)
    passes = normalize(captured.gm)
    given = captured.placeholders()

    def inputs_at(length: int | None, padded: bool) -> dict[fx.Node, Any]:
        return captured.placeholders(_probe_inputs(captured, length, padded))

    result = FoundAttention()
    seen = find(captured.gm, given, inputs_at)
    located = _locate(captured, [f for f in seen if isinstance(f, Found)])
    ours = {p: m for p, m in model.named_modules() if isinstance(m, Adapter)}
    for item in seen:
        if isinstance(item, Missed):
            path = _owner_of([item.core])
            own = _adapter_of(path, ours)
            latent = own is not None and ours[own].mixer.kind != "dense"
            reason = f"already {ours[own].mixer.kind}" if own and latent else item.reason
            result.refused.append(RefusedSite(own or path, reason))
            continue
        path, binding, reason = located[id(item)]
        if binding is None:
            result.refused.append(RefusedSite(path, reason))
            continue
        error, _ = self_check(captured.gm, item, inputs_at)
        hidden = int(item.region.hidden.meta["val"].shape[-1])
        memory = item.region.memory
        if error > TOLERANCE:
            text = f"not understood: rebuilt block differs by {error:.1e} (limit {TOLERANCE:g})"
            result.refused.append(RefusedSite(path, text))
            continue
        result.sites.append(
            AttentionSite(
                path, item.spec, True, error, binding, hidden,
                0 if memory is None else int(memory.meta["val"].shape[-1]),
            )
        )  # fmt: skip
    result.refused += _refused_cores(captured.gm, passes)
    return result


def _refused_cores(gm: fx.GraphModule, passes: list[PassResult]) -> list[RefusedSite]:
    """What looked like a core and was not taken by the passes that normalise cores."""
    nodes = {n.name: n for n in gm.graph.nodes}
    return [
        RefusedSite(_owner_of([nodes[name]]) if name in nodes else name, reason)
        for step in passes
        if step.name in ("fuse-sdpa", "fuse-eager")
        for name, reason in step.refused
    ]


def _adapter_of(path: str, ours: dict[str, Adapter]) -> str | None:
    """The converted block that `path` lies in."""
    return next((p for p in ours if path == p or path.startswith(p + ".")), None)


def _probe_inputs(
    captured: Capture, length: int | None, padded: bool, side: slice = slice(0, 3)
) -> dict[str, Any]:
    """The example inputs at another length, the first row padded where there is a mask.

    Left padding (the default) leaves rows that see nothing; the right side does not, so there
    every value is comparable.
    """
    inputs = dict(captured.inputs)
    if length is not None and "N" in captured.sizes:
        inputs = resized(inputs, captured.sizes["N"], length)
    if padded:
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.dim() == 2 and bool((value == 1).all()):
                value = value.clone()
                value[0, side] = 0
                inputs[name] = value
    return inputs


def _owner_of(nodes: list[fx.Node]) -> str:
    """Dotted path of the smallest module whose code holds all nodes."""
    stacks = [[path for path, _ in node.meta.get("nn_module_stack", {}).values()] for node in nodes]
    paths = [(stack[-1] if stack else "").split(".") for stack in stacks]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _locate(captured: Capture, found: list[Found]) -> dict[int, tuple[str, Binding | None, str]]:
    """Owner and binding of every found block, or the reason it has none."""
    owners = {id(f): [_owner_of(f.region.nodes), _owner_of(f.region.nodes[:4])] for f in found}
    paths = {p for pair in owners.values() for p in pair if p}
    inputs = _probe_inputs(captured, None, True, side=slice(-3, None))
    calls = watch(captured.model, paths, inputs)
    cached = _watch_cache(captured.model, paths, captured.inputs)
    wanted = [n for f in found for n in _boundary(f)]
    run = Evaluator(captured.gm).run(wanted, captured.placeholders(inputs))
    values = dict(zip(wanted, run, strict=True))
    located: dict[int, tuple[str, Binding | None, str]] = {}
    ours = {p: m for p, m in captured.model.named_modules() if isinstance(m, Adapter)}
    for item in found:
        whole, inner = owners[id(item)]
        own = _adapter_of(inner, ours)
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
                item.spec = AttentionSpec(
                    item.spec.q, item.spec.k, item.spec.v, item.spec.core, None
                )
            break
        located[id(item)] = (path, binding, reasons[min(1, len(reasons) - 1)])
    return located


def _boundary(item: Found) -> list[fx.Node]:
    region = item.region
    nodes = [region.hidden, region.memory, region.mask, region.exit.node, region.exit.joined]
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
    output = match_output(call.output, values[exit_node], arguments)
    if output is None:
        raise NotUnderstood(f"{path or 'the model'} returns something else than the block's output")
    mask = match(arguments, values[region.mask]) if region.mask is not None else None
    if region.mask is not None and mask is None and item.follows_padding:
        raise NotUnderstood(f"{path} does not receive the mask that hides padding")
    cos = sin = position = None
    if region.rotation is not None:
        cos, sin, position = _bind_rotation(captured, item, arguments)
    cache, part, layer_idx = cached.get(path, (None, None, 0))
    return Binding(
        hidden=hidden, memory=memory, mask=mask, cos=cos, sin=sin, position=position,
        cache=cache, cache_part=part, layer_idx=layer_idx, output=output,
    )  # fmt: skip


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
    from dataclasses import replace

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


def _with_frequencies(stream: Any, frequencies: tuple[float, ...]) -> Any:
    from dataclasses import replace

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
