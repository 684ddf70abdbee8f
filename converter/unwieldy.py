"""Sizes of an image that are too tangled to stay symbolic.

Windows that are padded and halved stage by stage make the height of an image an expression of
hundreds of operations, and torch.export spends minutes comparing such. They are noticed within
seconds; then the heights and widths of the example are kept as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from reattend.install.binding import leaves
from reattend.install.pieces import FixedLeaf, Path

#: key of a graph's `meta`: it holds for images of the example's height and width only
FIXED = "fixed_images"
#: operations in one size or comparison; convolutions that halve and round stay below 100
_LARGEST = 200


class Unwieldy(Exception):
    """A size has more operations than torch.export can work with."""


@dataclass
class Seen:
    """Whether a size was too large: torch.export may raise another error for it."""

    unwieldy: bool = False


@contextmanager
def noticing() -> Iterator[Seen]:
    """Stop a trace inside that compares sizes of more than `_LARGEST` operations."""
    seen, evaluate = Seen(), ShapeEnv.evaluate_expr

    def evaluated(self: Any, expression: Any, *args: Any, **kwargs: Any) -> Any:
        count = getattr(expression, "count_ops", None)
        if count is not None and count() > _LARGEST:
            seen.unwieldy = True
            raise Unwieldy(f"a size of {count()} operations")
        return evaluate(self, expression, *args, **kwargs)

    ShapeEnv.evaluate_expr = evaluated
    try:
        yield seen
    finally:
        ShapeEnv.evaluate_expr = evaluate


def symbolic_axes(value: Any, images: bool) -> Any:
    """What torch.export is told of an input: all axes symbolic; `images`: also heights, widths.

    Inputs that hold several tensors are told of one by one.
    """
    if isinstance(value, dict):
        return {key: symbolic_axes(item, images) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(symbolic_axes(item, images) for item in value)
    if not isinstance(value, Tensor):
        return None
    free = range(value.dim() if images or value.dim() < 4 else 1)
    return dict.fromkeys(free, torch.export.Dim.AUTO)


def has_images(inputs: dict[str, Any]) -> bool:
    """Whether an input has height and width, [B, channels, H, W] or more."""
    return any(isinstance(v, Tensor) and v.dim() >= 4 for v in inputs.values())


def held(
    gm: fx.GraphModule,
    arguments: dict[str, Any],
    nodes: list[tuple[Path | None, fx.Node | None]],
) -> tuple[FixedLeaf, ...]:
    """What a call of an owner must repeat, where the graph holds for one size of image only.

    Args:
        gm: as captured.
        arguments: of the watched call, by name.
        nodes: what is known of them in the graph, and where they stand.
    """
    if not gm.meta.get(FIXED):
        return ()
    found = [FixedLeaf(path=at, number=n) for at, n in leaves(arguments) if type(n) is int]
    for at, node in nodes:
        if at is not None and node is not None and isinstance(node.meta.get("val"), Tensor):
            sizes = tuple(s if isinstance(s, int) else None for s in node.meta["val"].shape)
            found.append(FixedLeaf(path=at, sizes=sizes))
    return tuple(found)
