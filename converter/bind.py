"""Match a block's boundary in the graph with its owner's call, by value.

Either the owner is exactly the block (`bind`), or what it does besides is cut out of the graph
(`bind_around`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from reattend.beside import absent_of, bound_extras, bound_position, check_cache
from reattend.capture import Call, Capture
from reattend.frame import Frame
from reattend.frequencies import bind_rotation
from reattend.hands import bind_hands
from reattend.install.binding import (
    Binding,
    bound,
    leaves,
    match,
    match_output,
    returns_bias,
)
from reattend.install.masking import adds_bias, match_hiding, match_mask, match_wider
from reattend.install.pieces import CacheAt, Path
from reattend.install.tables import match_table
from reattend.install.unmasked import stands_for_ones, unmasked
from reattend.mixers.relative import relative_bias
from reattend.mixers.scores import shown
from reattend.passes.evaluate import attribute
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.spec import Alibi, RelativeBias
from reattend.surround import Surround, Surrounding
from reattend.unwieldy import held
from reattend.weights import head_order


def boundary(item: Found) -> list[fx.Node]:
    """The nodes whose values decide a binding."""
    region = item.region
    nodes = [region.hidden, region.memory, region.mask, region.exit.node, region.exit.joined]
    nodes += [*region.extras, *region.handed.values(), region.position]
    return [n for n in nodes if n is not None]


def bind(
    captured: Capture,
    item: Found,
    path: str,
    call: Call,
    values: dict[fx.Node, Any],
    cache: CacheAt,
    stop: bool,
) -> Binding:
    """The binding of an owner that is exactly the block.

    Args:
        captured: the graph.
        item: the block.
        path: of the owner.
        call: its watched call.
        values: of the block's boundary in that call.
        cache: where the owner's cache is.
        stop: the block ends before its output projection.

    Raises:
        NotUnderstood: the owner receives or returns something else.
    """
    region = item.region
    arguments = bound(captured.model.get_submodule(path), call.args, call.kwargs)
    check_cache(path, cache)
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
    _check_heads(item, path, output)
    mask, adds, hides = None, False, False
    window: int | None = None
    if region.mask is not None:
        mask, adds = match_mask(arguments, values[region.mask])
        if mask is None:
            mask = match_hiding(arguments, values[region.mask])
            hides = mask is not None
        if mask is None and item.spec.core.pattern.kind in ("causal", "sliding"):
            mask = match_wider(arguments, values[region.mask], item.spec.core.pattern.window)
            window = None if mask is None else item.spec.core.pattern.window
    opaque = item.spec.core.pattern.kind == "opaque"
    if region.mask is not None and mask is None and (item.follows_padding or opaque):
        does = "decides what is seen" if opaque else "hides padding"
        raise NotUnderstood(f"{path} does not receive the mask that {does}")
    if opaque and mask is not None and not hides:
        kind = unmasked(captured.model.get_submodule(path), call, mask, values[exit_node])
        pattern = replace(item.spec.core.pattern, unmasked=kind)
        item.spec = replace(item.spec, core=replace(item.spec.core, pattern=pattern))
    extras = bound_extras(item, path, arguments, values, cache)
    owner = captured.model.get_submodule(path)
    spare = tuple(stands_for_ones(owner, call, at, values[exit_node]) for at in extras)
    cos = sin = position = None
    if region.rotation is not None:
        cos, sin, position = bind_rotation(captured, item, arguments)
    position = bound_position(item, path, arguments, values, position)
    return Binding(
        hidden=hidden, memory=memory, mask=mask,
        mask_adds_bias=adds and isinstance(item.spec.core.bias, RelativeBias | Alibi),
        cos=cos, sin=sin, position=position,
        cache=cache.path, cache_part=cache.part, layer_idx=cache.layer_idx,
        layer_shift=cache.shift or None, output=output,
        extras=extras, extras_spare=spare, mask_hides=hides, mask_window=window,
        absent=absent_of(captured, item, path, arguments),
        hands=bind_hands(captured, item, path, arguments, values),
        fixed=held(captured.gm, arguments, [
            (hidden, region.hidden), (memory, region.memory), (mask, region.mask),
            *zip(extras, region.extras, strict=True),
        ]),
    )  # fmt: skip


def bind_around(
    captured: Capture,
    item: Found,
    place: Frame,
    call: Call,
    values: dict[fx.Node, Any],
    cache: CacheAt,
    stop: bool,
    dropout: bool,
) -> tuple[Binding, Surrounding]:
    """The binding of an owner that does more than the block, and its programs.

    Args:
        captured, item, call, cache, stop: as for `bind`.
        place: the owner's call in the graph.
        values: of the block's boundary, its rotary tables and the owner's entries and exits.
        dropout: the owner drops activations while training.

    Raises:
        NotUnderstood: what the owner does is no function of its arguments and the block.
    """
    region = item.region
    arguments = bound(captured.model.get_submodule(place.path), call.args, call.kwargs)
    check_cache(place.path, cache)
    y = region.exit.joined if stop else region.exit.node
    cutter = Surround(captured, item, place, arguments, values, y)
    hidden = cutter.enter("hidden", region.hidden)
    memory = None if region.memory is None else cutter.enter("memory", region.memory)
    mask, adds = None, False
    if region.mask is not None:
        mask, adds = match_mask(arguments, values[region.mask])
        opaque = item.spec.core.pattern.kind == "opaque"
        if mask is None and item.follows_padding and not opaque:
            mask = _validity_argument(arguments, values[region.mask])
        if mask is None and (item.follows_padding or opaque):
            mask, adds = cutter.enter("mask", region.mask), adds_bias(values[region.mask])
    cos = sin = position = None
    if region.rotation is not None:
        cos, sin, position = bind_rotation(captured, item, arguments)
        if cos is None and position is None:
            cos, sin = _made_tables(cutter, item, values)
    position = bound_position(item, place.path, arguments, values, position)
    output, outputs = cutter.result(call, arguments, _added(captured, item, values))
    _check_heads(item, place.path, output)
    if region.handed:
        raise NotUnderstood(f"{place.path} does more than the attention whose keys it hands on")
    done = cutter.done(outputs, dropout)
    binding = Binding(
        hidden=hidden, memory=memory, mask=mask,
        mask_adds_bias=adds and isinstance(item.spec.core.bias, RelativeBias | Alibi),
        cos=cos, sin=sin, position=position,
        cache=cache.path, cache_part=cache.part, layer_idx=cache.layer_idx,
        layer_shift=cache.shift or None, output=output,
        around=done.config, extras=bound_extras(item, place.path, arguments, values, cache),
        absent=absent_of(captured, item, place.path, arguments),
        fixed=held(captured.gm, arguments, [(at, n) for n, at in cutter.arguments.items()]),
    )  # fmt: skip
    return binding, done


def _check_heads(item: Found, path: str, output: Any) -> None:
    if returns_bias(output) and head_order(item.spec)[0] != list(range(item.spec.core.heads)):
        raise NotUnderstood(f"{path} returns its position bias in another order of heads")


def _validity_argument(arguments: dict[str, Any], mask_BhNM: Tensor) -> Path | None:
    """The leaf [B, N] that says which tokens are real, where the mask is made of it inside."""
    seen = shown(mask_BhNM)
    if seen.dim() != 4 or seen.shape[-1] != seen.shape[-2]:
        return None
    valid_BN = torch.diagonal(seen, dim1=-2, dim2=-1)[:, 0]
    for path, leaf in leaves(arguments):
        if not isinstance(leaf, Tensor) or leaf.shape != valid_BN.shape or leaf.is_complex():
            continue
        if bool(((leaf == 0) | (leaf == 1)).all()) and bool(((leaf != 0) == valid_BN).all()):
            return path
    return None


def _made_tables(cutter: Surround, item: Found, values: dict[fx.Node, Any]) -> tuple[Any, Any]:
    """cos and sin where the owner makes them from its arguments; else positions are counted."""
    rotation = item.region.rotation
    assert rotation is not None
    tables = {node.name: values[node] for node in item.region.externals}
    sin = match_table(tables, rotation.sin_NP)
    columns = () if sin is None else sin[0].columns
    found: list[Any] = []
    for name, table_NP in (("cos", rotation.cos_NP), ("sin", rotation.sin_NP)):
        for node in item.region.externals:
            hit = match_table({name: values[node]}, table_NP, columns)
            if hit is None or abs(hit[1] - 1) > 1e-4:
                continue
            try:
                path = cutter.enter(name, node)
            except NotUnderstood:
                continue  # it depends on sizes alone, or on another input of the model
            found.append(hit[0].model_copy(update={"path": path}))
            break
    if len(found) == 2:
        return found[0], found[1]
    for name in ("cos", "sin"):
        cutter.drop(name)
    return None, None


def _added(captured: Capture, item: Found, values: dict[fx.Node, Any]) -> Tensor:
    """What the block adds to its scores, [1, H, N, M]; zeros without a position bias."""
    core, region = item.spec.core, item.region
    n = values[region.hidden].shape[1]
    m = n if region.memory is None else values[region.memory].shape[1]
    if not isinstance(core.bias, RelativeBias):
        zeros: Tensor = values[region.hidden].new_zeros(1, core.heads, n, m)
        return zeros
    table = attribute(captured.gm, core.bias.weight).detach()
    return relative_bias(table, core.bias.buckets, n, m)
