"""Random activations in place of the arguments of a watched call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.install.binding import Binding
from reattend.install.pieces import Path


def drawn(binding: Binding) -> set[Path]:
    """Arguments that are activations: what the block and the programs around it read."""
    assert binding.around is not None
    kept = {binding.mask, binding.position}
    kept |= {t.path for t in (binding.cos, binding.sin) if t is not None}
    read_by = {binding.hidden, binding.memory}
    for name, piece in binding.around.pieces().items():
        if name.removeprefix("before.") not in ("mask", "cos", "sin"):
            read_by |= {feed.path for feed in piece.feeds if feed.axis is None}
    return {p for p in read_by - kept if p is not None}


def redrawn(leaf: Any, draw: bool, generator: torch.Generator) -> Any:
    """A float argument in float64, random where it is an activation."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    if draw and bool(torch.isfinite(leaf).all()) and bool((leaf.abs() < 1e6).all()):
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    return leaf.double()


def replaced(arguments: Any, changed: dict[Path, Any], path: Path = ()) -> Any:
    """The same structure with other leaves."""
    if path in changed:
        return changed[path]
    if isinstance(arguments, dict):
        return {k: replaced(v, changed, (*path, k)) for k, v in arguments.items()}
    if type(arguments) in (list, tuple):
        return type(arguments)(replaced(v, changed, (*path, i)) for i, v in enumerate(arguments))
    return arguments
