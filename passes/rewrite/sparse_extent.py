"""Patterns that would change nothing in a block, or leave its queries alone, are refused."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

from reattend.mixers.config import CoreConfig
from reattend.passes.base import Refusal
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import Recorded
from reattend.patterns.sizing import alone, hides, own_length, places, sized


def pointless(
    core: CoreConfig, patterns: Sequence[HeadPattern], longest: int | None, main: HeadPattern
) -> Refusal | None:
    """Why these patterns make no sense, if none of them hides a key, or one hides all others.

    Args:
        core: of the block.
        patterns: what its heads may get.
        longest: tokens that the model reads at most; None: only grids say how many there are.
        main: the plan's `pattern`, which a setting can change.
    """
    judged = [(p, own_length(p) or longest) for p in patterns if not p.full]
    known = [(p, n) for p, n in judged if n is not None]
    for p, n in known:
        if alone(p, n, core):
            return Refusal(
                f"{p.words()}: every query sees itself and nothing else (of {n} tokens at most): "
                "give a wider window, sinks, or distances and places that the text has"
            )
    if len(known) < len(judged) or not known or any(hides(p, n, core) for p, n in known):
        return None
    words = "; ".join(dict.fromkeys(p.words() for p, _ in known))
    better = [sized(p, n, core) for p, n in known if p == main]
    settings = [f"--set pattern.{k}={v}" for k, v in (better[0] if better else {}).items()]
    example = f", for example {' '.join(settings)}," if settings else ""
    return Refusal(
        f"{words}: hides nothing, every query sees all {max(n for _, n in known)} keys there are "
        f"at most: give smaller numbers{example} or `full: true` to change nothing"
    )


def misplaced(patterns: Sequence[HeadPattern], tokens: int) -> Refusal | None:
    """Why a block that reads so many tokens, always, has not the image of a pattern."""
    wrong = [g for p in patterns for g in places(p) if not g.fits(tokens)]
    if not wrong:
        return None
    square = [(isqrt(tokens - text), text) for text in (0, 1)]
    fits = [(side, text) for side, text in square if side**2 + text == tokens]
    example = "".join(
        f", for example image_grid: [{side}, {side}] with text_before: {text}"
        for side, text in fits[:1]
    )
    return Refusal(
        f"a grid of {wrong[0].words()} does not fit: the block reads {tokens}; give image_grid, "
        f"text_before and text_after that sum to that{example}"
    )


def unread(pattern: HeadPattern, layers: int) -> Refusal | None:
    """Why a stack of so many layers has none that reads what others noted."""
    select = pattern.select
    if not isinstance(select, Recorded) or min(select.at) < layers - 1:
        return None
    example = f", for example --set 'pattern.select.at=[{(layers - 1) // 2}]'"
    return Refusal(
        f"{pattern.words()}: hides nothing: no layer lies behind one that notes, the stack has "
        f"{layers} (from 0){example if layers > 1 else ''}"
    )
