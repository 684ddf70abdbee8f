"""Whether a pattern leaves anything out, or lets anything in, and what would fit a short text.

Budgets of selectors that only the scores decide (`topp`, `threshold`) may leave something out.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from reattend.mixers.config import CoreConfig
from reattend.patterns.grids import Grid, GridWindow
from reattend.patterns.learned import LowRank
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.routing import Blocks


def places(pattern: HeadPattern) -> list[Grid]:
    """Where the images or videos lie that its terms and its selector are laid over."""
    found: list[Grid] = [g for g in pattern.grids if g.shape]
    if isinstance(s := pattern.select, Blocks | LowRank) and s.shape:
        before, after = s.text_before, s.text_after
        found.append(GridWindow(radius=1, shape=s.shape, text_before=before, text_after=after))
    return found


def own_length(pattern: HeadPattern) -> int | None:
    """Tokens of the image or video that the pattern is laid over, with its text; None: none."""
    lengths = [g.text_before + g.tokens + (g.text_after or 0) for g in places(pattern)]
    return lengths[0] if lengths else None


def hides(pattern: HeadPattern, length: int, core: CoreConfig) -> bool:
    """Whether some query of so many tokens may not read a key that the block itself shows it."""
    if pattern.full or (pattern.select is not None and pattern.select.covers(length)):
        return False
    counts = (pattern.counted(n, core) for n in reversed(_lengths(pattern, length, core)))
    return any(bool((seen < every).any()) for seen, every in counts)


def alone(pattern: HeadPattern, length: int, core: CoreConfig) -> bool:
    """Whether queries of so many tokens see themselves and nothing else, which the block shows."""
    if pattern.full or pattern.select is not None:
        return False
    counts = (pattern.counted(n, core) for n in _lengths(pattern, length, core))
    if any(bool((seen > 1).any()) for seen, _ in counts):
        return False
    return bool((pattern.counted(length, core)[1] > 1).any())


def _lengths(pattern: HeadPattern, length: int, core: CoreConfig) -> list[int]:
    """Lengths of texts that are asked, ascending: of a causal block the last query is counted, and
    in a window of the block's own a column is seen by the queries close behind it only.
    """
    lengths = {length}
    if core.causal:
        lengths |= {2**n for n in range(1, 24)} | {c + 2 for c in pattern.columns}
    return sorted(n for n in lengths if n <= length)


def sized(pattern: HeadPattern, length: int, core: CoreConfig) -> dict[str, Any]:
    """Settings (`select.topk`: 16) with which something is hidden; empty where none are known."""
    found: dict[str, Any] = {}
    if pattern.sinks > length // 4:
        found["sinks"] = max(1, length // 16)
    if pattern.window > length // 4:
        found["window"] = max(2, length // 4)
    if pattern.window_slope > 1 / 4:
        found["window_slope"] = 1 / 4
    if pattern.grid is not None and pattern.grid.shape:
        found["grid.radius"] = max(1, min(pattern.grid.shape) // 4)
    if pattern.select is not None:
        found |= {f"select.{k}": v for k, v in pattern.select.sized(length).items()}
    data = pattern.model_dump(exclude_unset=True)
    for key, value in found.items():
        *outer, last = key.split(".")
        here = data
        for name in outer:
            here = here[name]
        here[last] = value
    try:
        fits = hides(HeadPattern.model_validate(data), length, core)
    except ValidationError:
        return {}
    return found if fits else {}
