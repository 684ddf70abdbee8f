"""Do an owner's programs give the same token by token as for the whole sequence?

A cache brings them only the new tokens. Programs that work on each token alone, or on arguments
that say where a token stands, do not notice; those that mix tokens or count them do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattend.activations import drawn, redrawn, replaced
from reattend.capture import Call
from reattend.errors import ArgumentError
from reattend.install.around import Around
from reattend.install.binding import Binding, bound, read, same
from reattend.install.caching import Steps
from reattend.install.pieces import AFTER, BEFORE

_LIMIT = 1e-5


def stepwise(
    model: nn.Module, path: str, binding: Binding, around: Around, width: int, steps: Steps
) -> bool:
    """Whether every program of an owner gives the same from pieces as from the whole.

    Args:
        model: the original.
        path: of the owner.
        binding: of the owner, with programs.
        around: the programs in float64; activations are random, the rest is as the model had it.
        width: of the mixer's output.
        steps: watched calls of the owner.
    """
    module, generator = model.get_submodule(path), torch.Generator().manual_seed(3)
    whole = _arguments(module, steps.whole[path])
    activations = {}
    for at in drawn(binding):
        leaf = read(whole, at)
        if isinstance(leaf, Tensor) and leaf.dim() >= 2:
            activations[at] = redrawn(leaf, True, generator)
    whole = replaced(whole, activations)
    try:
        hidden = read(around.prepare(whole), binding.hidden)
        y = torch.randn((*hidden.shape[:-1], width), generator=generator, dtype=torch.float64)
        made = _run(around, whole, y)
        for start, end, calls in steps.pieces:
            arguments = _arguments(module, calls[path])
            part = {
                at: value[:, start:end]
                for at, value in activations.items()
                if isinstance(read(arguments, at), Tensor)
                and read(arguments, at).shape == value[:, start:end].shape
            }
            got = _run(around, replaced(arguments, part), y[:, start:end])
            for name, value in got.items():
                if not same(value, _rows(name, made[name], start, end)) <= _LIMIT:
                    return False
    except (RuntimeError, ArgumentError):  # shapes that only fit the whole, a mask left out
        return False
    return True


def _arguments(module: nn.Module, call: Call) -> dict[str, Any]:
    """Arguments by name, floats in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.double()
        if isinstance(value, dict):
            return {k: wide(v) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(wide(v) for v in value)
        return value

    found: dict[str, Any] = wide(bound(module, call.args, call.kwargs))
    return found


@torch.no_grad()
def _run(around: Around, arguments: dict[str, Any], y: Tensor) -> dict[str, Tensor]:
    """What each program makes of a call and the mixer's output."""
    arguments = around.finish(around.prepare(arguments), y)
    made = {k: v for k, v in arguments[BEFORE].items() if v is not None}
    return {**made, **{f"after.{i}": v for i, v in enumerate(arguments[AFTER])}}


def _rows(name: str, whole: Tensor, start: int, end: int) -> Tensor:
    """The part of a program's value that belongs to some tokens."""
    if name == "memory":
        return whole
    if name == "mask":
        return whole[..., start:end, :end]
    return whole[..., start:end, :] if name in ("cos", "sin") else whole[:, start:end]
