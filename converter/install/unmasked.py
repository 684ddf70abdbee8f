"""What a block does when it is called without its mask: found by calling it.

Models leave a mask out where it would hide nothing (one new token, no padding). A block whose
pattern is the mask itself may then do what the original was seen to do, and nothing else.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

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
    arguments = bound(owner, call.args, call.kwargs)
    given = read(arguments, mask)
    where = [p for p, leaf in leaves({"result": call.output}) if same(leaf, y) <= rounding(y)]
    if len(mask) != 1 or len(where) != 1:
        return ""

    def run(value: Tensor | None) -> Tensor | None:
        try:
            with evaluation(owner), torch.no_grad():
                result = owner(**{**arguments, str(mask[0]): value})
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return None  # it cannot be called so
        leaf = read({"result": result}, where[0])
        return leaf if isinstance(leaf, Tensor) else None

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


def _like(given: Tensor, seen: Tensor) -> Tensor:
    """`seen` (True: visible) in the owner's spelling: bool, or zero and the lowest number."""
    if given.dtype == torch.bool:
        return seen
    hidden = torch.full_like(given, torch.finfo(given.dtype).min)
    return torch.where(seen, torch.zeros_like(given), hidden)
