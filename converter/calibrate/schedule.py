"""Learning rate: how large for what and for which start, then warm-up and half a cosine to zero."""

from __future__ import annotations

import math

WARMUP = 0.05
#: how far a weight that starts from nothing may have to go
FAR_OFF = 4.0
#: largest rate of such weights
FRESH = 0.1


def factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the stage's tokens."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP)))


def fresh_rate(rate: float, steps: float) -> float:
    """Peak rate of weights that hold nothing of the original's, such as feature maps.

    AdamW moves a weight by about its rate in a step, half as far on average under the cosine. At a
    rate that keeps trained weights where they are, new ones would not get to where they are of use
    in a short training, so theirs is what takes them `FAR_OFF` in that many steps, within `FRESH`.

    Args:
        rate: of the weights that the original had.
        steps: of the whole stage.
    """
    return max(rate, min(FRESH, 2 * FAR_OFF / max(steps, 1.0)))


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
