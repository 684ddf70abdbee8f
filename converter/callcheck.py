"""An owner that is exactly its block proves its binding: its watched call against the adapter's.

The block has passed `reattend.selfcheck`; what is on trial here is which argument is what. The
call had padding on the right, so a mask that is read wrongly shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reattend.capture import Call, Capture
from reattend.install.adapter import Adapter
from reattend.install.binding import bound, leaves, read, same, signature_of
from reattend.locate import Place
from reattend.mixers.scores import shown
from reattend.passes.evaluate import attribute
from reattend.passes.find.sites import Found
from reattend.weights import build_dense

#: relative difference that is rounding: float32, and units in the last place of shorter types
_FLOAT32, _UNITS = 1e-4, 16.0


def call_check(
    captured: Capture, found: Found, place: Place, call: Call, mask: Tensor | None
) -> str:
    """Why the binding is not trusted; empty if it is, or if the model's own result is no number.

    Args:
        captured: the normalised graph.
        found: the block, proven by itself.
        place: its owner, without programs.
        call: what the owner was called with and what it returned.
        mask: of the core in that call.
    """
    binding, region = place.binding, found.region
    assert binding is not None
    module = captured.model.get_submodule(place.path)
    width = 0 if region.memory is None else int(region.memory.meta["val"].shape[-1])
    hidden = int(region.hidden.meta["val"].shape[-1])
    mixer = build_dense(found.spec, lambda n: attribute(captured.gm, n).detach(), hidden, width)
    plain = binding.model_copy(update={"cache": None})  # the watched call has filled its cache
    adapter = Adapter(mixer, plain, signature_of(module))
    arguments = bound(module, call.args, call.kwargs)
    handed = [read(arguments, h.container)[h.key] for h in binding.hands]
    with torch.no_grad():
        y = next(leaf for _, leaf in leaves(_only_y(binding.output, adapter.answer(arguments))))
    expected = next(leaf for _, leaf in leaves(_only_y(binding.output, call.output)))
    for hand, before in zip(binding.hands, handed, strict=True):
        container = read(arguments, hand.container)
        made, container[hand.key] = container[hand.key], before
        pairs = zip(leaves({"": made}), leaves({"": before}), strict=True)
        if any(same(a, b) > rounding_limit(b.dtype) for (_, a), (_, b) in pairs):
            return f"{place.path} hands on other keys or values than the model's"
    x = read(arguments, binding.hidden)
    rows = torch.ones(x.shape[:2], dtype=torch.bool)
    if mask is not None:
        seen = shown(mask)
        while seen.dim() < 4:
            seen = seen[None]
        rows = seen.any(-1).all(1).expand(x.shape[:2])
    if y.shape != expected.shape:
        return f"{place.path} returns {tuple(expected.shape)}, its block {tuple(y.shape)}"
    if y.shape[:2] != rows.shape:
        rows = torch.ones(y.shape[:2], dtype=torch.bool)
    if not bool(expected[rows].isfinite().all()):
        return ""  # the model's own numbers overflow: nothing can be learned from them
    gap = float((y.double() - expected.double())[rows].abs().max())
    scale = max(float(expected.double()[rows].abs().max()), 1e-30)
    limit = rounding_limit(expected.dtype)
    if gap <= limit * scale:
        return ""
    return (
        f"{place.path} called as the model does differs by {gap / scale:.1e} from its block "
        f"(limit {limit:.0e}): an argument is not what it seems"
    )


def rounding_limit(dtype: torch.dtype) -> float:
    """How far a block in its normal form may be from the model's own, relative to its largest."""
    return max(_FLOAT32, _UNITS * torch.finfo(dtype).eps)


def _only_y(shape: Any, output: Any) -> list[Tensor]:
    """The part of an owner's result that the mixer makes."""
    if shape == "y":
        return [output]
    if not isinstance(shape, dict) or "path" in shape:
        return []
    items = next(iter(shape.values()))
    return [t for s, o in zip(items, output, strict=True) for t in _only_y(s, o)]


def mask_of(captured: Capture, found: Found, inputs: dict[str, Any]) -> Tensor | None:
    """The core's mask under these inputs."""
    node: fx.Node | None = found.region.mask
    if node is None:
        return None
    mask: Tensor = captured.values([node], inputs)[node]
    return mask
