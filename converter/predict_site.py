"""What one block adds to a run: seconds of its own by stage, and memory beside the model.

The forecasts of the stages (`predict_time`, `predict_memory`) are sums and maxima of these and of
what the model as a whole takes: passes over the data, logits, weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reattend.predict_statistics import (
    gram_width,
    moments_bytes,
    solves,
    spreading_bytes,
    training,
)
from reattend.preflight import Choice
from reattend.rates import speed

#: Operations of one solve for second moments, and numbers alive in it, per width cubed and squared.
SOLVE, SOLVING = 40.0, 8


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second, measured on this machine at this moment."""

    float64: float
    float32: float

    @classmethod
    def measured(cls) -> Rates:
        """Of one product each."""
        return cls(speed(torch.float64), speed(torch.float32))


def own_seconds(choice: Choice, tokens: int, seq_len: int, rates: Rates) -> dict[str, float]:
    """Seconds by stage that a block takes beyond the model's own passes.

    Args:
        choice: a site that is converted.
        tokens: read for statistics.
        seq_len: tokens of a row.
        rates: of the machine.
    """
    width, core = gram_width(choice), choice.config.core
    weighed = 12.0 * seq_len * core.heads * core.qk_head_dim if "attention" in choice.needs else 0.0
    solve = SOLVE * width**3 / rates.float64
    count = solves(choice)
    trained = training(choice, seq_len)[0]
    return {
        "statistics": tokens * (2.0 * width**2 + weighed) / rates.float64 if width else 0.0,
        "choose": solve * max(0, count - 1),
        "rewrite": solve * min(1, count) + trained / rates.float32,
    }


def solving_bytes(width: int) -> int:
    """Of one solve for moments of this width."""
    return 8 * SOLVING * width**2


def own_bytes(choice: Choice, element: int, batch: int, seq_len: int) -> int:
    """Peak memory that a block adds to the model's, were it the only one that changes.

    Args:
        choice: a site that is converted.
        element: bytes of a number as the model is stored.
        batch: tokens of a batch of statistics.
        seq_len: tokens of a row.
    """
    width = gram_width(choice)
    moments, new = moments_bytes(choice), new_bytes(choice, element)
    reading = moments + measuring_bytes(width, batch) + spreading_bytes([choice], seq_len)
    building = max(moments, new) + solving_bytes(width) + training(choice, seq_len)[1]
    return int(max(reading if width else 0, building))


def measuring_bytes(width: int, batch: int) -> int:
    """Of adding a batch of so many tokens to moments of this width."""
    return 2 * 8 * batch * width + 8 * width**2


def new_bytes(choice: Choice, element: int) -> int:
    """Of the weights that a block gets; those it keeps are shared with the original."""
    return (choice.after.parameters - choice.after.kept) * element
