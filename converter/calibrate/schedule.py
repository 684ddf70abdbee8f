"""Learning rate: how large for this start, then linear warm-up and half a cosine to zero."""

from __future__ import annotations

import math

WARMUP = 0.05


def factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the stage's tokens."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP)))


def pace(first: float, far: float) -> float:
    """Share of a stage's learning rate for weights whose first loss is `first`, at most 1.

    Losses are squared distances, so their root is the distance to go. AdamW's steps are as long as
    its learning rate whatever the gradient: one made for a far start carries a near one away, and
    brings it back only as the rate falls.

    Args:
        first: loss before any update.
        far: loss from which on the whole rate is right.
    """
    return min(1.0, math.sqrt(max(first, 0.0) / far))
