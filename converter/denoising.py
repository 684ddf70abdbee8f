"""Which passes of a diffusion language model belong to one text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from reattend.errors import ArgumentError
from reattend.mixers.selecting.observed import ObservedMethod, Text


@contextmanager
def denoising(model: nn.Module, steps: int, new_tokens: int = 0) -> Iterator[None]:
    """Inside, the passes of a model converted with `select: {kind: observed}` fill in one text.

    The first passes see every key; the blocks that the last of those pays most attention to are all
    that the passes behind it read.

    Args:
        model: the converted model.
        steps: passes that the text takes.
        new_tokens: tokens at the end of the text that are filled in; blocks of the prompt and of
            these are chosen apart.

    Raises:
        ArgumentError: the model has no such block, or is inside already; `steps` is not positive.
    """
    found = [m for m in model.modules() if isinstance(m, ObservedMethod)]
    if not found or steps < 1 or new_tokens < 0:
        what = f"steps={steps}, new_tokens={new_tokens}" if found else "a model without such blocks"
        raise ArgumentError(
            f"denoising was given {what}",
            why="it tells blocks with `select: {kind: observed}` which passes share a text",
            next_step="convert with plan `sparsed`, and pass steps >= 1, new_tokens >= 0",
        )
    if any(m.text is not None for m in found):
        raise ArgumentError(
            "a model that fills in a text was given another one",
            next_step="leave the first `with denoising(...)` before the next",
        )
    for method in found:
        method.text = Text(steps, new_tokens)
    try:
        yield
    finally:
        for method in found:
            method.text = None
