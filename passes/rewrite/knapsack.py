"""Share one budget: exactly one choice per curve, least total error, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Curve(Generic[T]):
    """What something costs at every size.

    Attributes:
        error: [b] at size b; infinite where nothing has that size.
        sizes: the choice that reaches it.
    """

    error: np.ndarray
    sizes: dict[int, T]

    @classmethod
    def of(cls, choices: dict[int, tuple[float, T]]) -> Curve[T]:
        """From size -> (error, choice)."""
        error = np.full(max(choices) + 1, np.inf)
        for size, (value, _) in choices.items():
            error[size] = value
        return cls(error, {size: choice for size, (_, choice) in choices.items()})


def knapsack(curves: Sequence[Curve[T]], budget: int) -> list[T]:
    """The choice of every curve with the least total error, sizes summing to at most `budget`.

    Raises:
        ValueError: nothing fits.
    """
    total = np.full(budget + 1, np.inf)
    total[0] = 0.0
    taken: list[np.ndarray] = []
    for one in curves:
        new, pick = np.full(budget + 1, np.inf), np.zeros(budget + 1, dtype=np.int64)
        for size in one.sizes:
            if size > budget:
                continue
            reached = np.full(budget + 1, np.inf)
            reached[size:] = total[: budget + 1 - size] + one.error[size]
            better = reached < new
            new[better], pick[better] = reached[better], size
        total = new
        taken.append(pick)
    if not np.isfinite(total).any():
        raise ValueError(f"the smallest sizes sum to more than {budget}")
    left, sizes = int(np.argmin(total)), []
    for one, pick in zip(reversed(curves), reversed(taken), strict=True):
        sizes.append(one.sizes[int(pick[left])])
        left -= int(pick[left])
    return sizes[::-1]
