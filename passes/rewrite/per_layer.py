"""Options that may be a list with one entry for each layer of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from reattend.mixers.config import Frozen

Options = TypeVar("Options", bound=Frozen)


def at_layer(options: Options, names: Sequence[str], layer: int, layers: int) -> Options | str:
    """The options of one layer; the reason where a list has another length.

    Args:
        options: of all layers.
        names: fields that may be lists.
        layer: number in the stack, from 0.
        layers: of the stack.
    """
    update: dict[str, object] = {}
    for name in names:
        value = getattr(options, name)
        if isinstance(value, tuple):
            if len(value) != layers:
                return f"{name} lists {len(value)} layers, the stack has {layers}"
            update[name] = value[layer]
    return options.model_copy(update=update) if update else options
