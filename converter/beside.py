"""What an owner's call brings beside the hidden state: further inputs, positions, a cache."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx

from reattend.capture import Capture
from reattend.inputs import is_hf
from reattend.install.binding import match, signature_of
from reattend.install.pieces import BOTH, CacheAt, Path
from reattend.passes.find.reasons import NotUnderstood
from reattend.passes.find.sites import Found
from reattend.spec import Added


def bound_position(
    item: Found,
    path: str,
    arguments: dict[str, Any],
    values: dict[fx.Node, Any],
    known: Path | None,
) -> Path | None:
    """Where the owner receives positions: for its rotation, `known`, or for a factor of queries."""
    node = item.region.position
    if node is None:
        if item.region.streams["q"].growth is not None and known is not None:
            raise NotUnderstood(f"{path} counts tokens for one thing and is told for another")
        return known
    found = match(arguments, values[node])
    if found is None:
        raise NotUnderstood(f"{path} does not receive {node.name}, positions that its queries need")
    return found


def bound_extras(
    item: Found,
    path: str,
    arguments: dict[str, Any],
    values: dict[fx.Node, Any],
    cache: CacheAt,
) -> tuple[Path, ...]:
    """Where the owner receives what its own steps read beside the hidden state."""
    if cache.path is not None and isinstance(item.spec.core.bias, Added):
        raise NotUnderstood(
            f"{path} adds to its scores what it computes from the tokens of one call, which cached "
            f"decoding does not have"
        )
    found = []
    for node in item.region.extras:
        place = match(arguments, values[node])
        if place is None:
            raise NotUnderstood(f"{path} does not receive {node.name}, which the block reads")
        found.append(place)
    return tuple(found)


def absent_of(
    captured: Capture, item: Found, path: str, arguments: dict[str, Any]
) -> tuple[str, ...]:
    """Parameters that the call leaves out; transformers' own have meanings that are known.

    Not so where the block computes its own scores: XLNet's memories make them wider.
    """
    if is_hf(captured.model) and not isinstance(item.spec.core.bias, Added):
        return ()
    spread = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature_of(captured.model.get_submodule(path)).parameters
    return tuple(
        name
        for name, parameter in parameters.items()
        if parameter.kind not in spread and arguments.get(name) is None
    )


def check_cache(path: str, cache: CacheAt) -> None:
    """Refuse what a converted layer has no state for.

    Raises:
        NotUnderstood: several caches in one module.
    """
    if cache.shift == ():
        raise NotUnderstood(f"{path} is called several times, each with a cache of its own")
    if cache.part == BOTH:
        raise NotUnderstood(
            f"{path} keeps keys of its own tokens and of an encoder's, each in a part of the cache "
            f"of their own; a converted layer has one part"
        )
