"""Learning rate over a stage: linear warm-up, then half a cosine to zero."""

from __future__ import annotations

import math

WARMUP = 0.05


def factor(progress: float) -> float:
    """Share of the peak learning rate at `progress` (0 to 1) of the stage's tokens."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP)))
