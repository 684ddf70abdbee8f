"""What a block does when it is called without its mask: found by calling it.

Models leave a mask out where it would hide nothing (one new token, no padding). A block whose
pattern is the mask itself may then do what the original was seen to do, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from reattend.activations import replaced
from reattend.capture import Call
from reattend.install.binding import bound, leaves, read, rounding, same
from reattend.install.pieces import Path
from reattend.running import evaluation

Unmasked = Literal["", "full", "causal"]


def unmasked(owner: nn.Module, call: Call, mask: Path, y: Tensor) -> Unmasked:
    """Compare the owner without a mask with the owner under a full and a causal one.

    Args:
        owner: the module as the model has it.
        call: one of its calls.
        mask: where the mask stands among the arguments.
        y: the block's result in that call.

    Returns:
        The mask that "no mask" stands for; empty if it is neither, or the owner needs one.
    """
    given = read(bound(owner, call.args, call.kwargs), mask)
    run = _runner(owner, call, mask, y)
    without = run(None)
    if without is None:
        return ""
    everything = torch.ones_like(given, dtype=torch.bool)
    kinds: list[tuple[Unmasked, Tensor]] = [("full", everything)]
    if given.shape[-1] == given.shape[-2]:
        kinds.append(("causal", everything.tril()))
    for kind, seen in kinds:
        other = run(_like(given, seen))
        if other is not None and same(without, other) <= rounding(y):
            return kind
    return ""


def stands_for_ones(owner: nn.Module, call: Call, at: Path, y: Tensor) -> str:
    """The dtype of an argument [B, N] that means ones where a call leaves it out, else empty.

    Args:
        owner, call, y: as for `unmasked`.
        at: where the argument stands.
    """
    given = read(bound(owner, call.args, call.kwargs), at)
    if given.dim() != 2 or given.dtype.is_complex or given.shape != y.shape[:2]:
        return ""
    run = _runner(owner, call, at, y)
    without, ones = run(None), run(torch.ones_like(given))
    if without is None or ones is None or not same(without, ones) <= rounding(y):
        return ""
    return str(given.dtype).removeprefix("torch.")


def _runner(
    owner: nn.Module, call: Call, at: Path, y: Tensor
) -> Callable[[Tensor | None], Tensor | None]:
    """The block's result in a call of the owner that differs in one argument."""
    arguments = bound(owner, call.args, call.kwargs)
    where = [p for p, leaf in leaves({"result": call.output}) if same(leaf, y) <= rounding(y)]

    def run(value: Tensor | None) -> Tensor | None:
        if len(where) != 1:
            return None
        try:
            with evaluation(owner), torch.no_grad():
                result = owner(**replaced(arguments, {at: value}))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return None  # it cannot be called so
        leaf = read({"result": result}, where[0])
        return leaf if isinstance(leaf, Tensor) else None

    return run


def _like(given: Tensor, seen: Tensor) -> Tensor:
    """`seen` (True: visible) in the owner's spelling: bool, or zero and the lowest number."""
    if given.dtype == torch.bool:
        return seen
    hidden = torch.full_like(given, torch.finfo(given.dtype).min)
    return torch.where(seen, torch.zeros_like(given), hidden)
