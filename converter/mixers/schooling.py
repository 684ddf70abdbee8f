"""Mixers that change while they are trained, or add to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Schooled(ABC):
    """What a mixer inherits beside `Mixer` to be told of training by every stage of calibration."""

    @property
    @abstractmethod
    def anneals(self) -> bool:
        """Whether training starts with a block that is nearer to the original than its end."""

    @abstractmethod
    def trained(self, share: float) -> None:
        """Training has used this share of its tokens; at 1 the block is as it will be used."""

    @abstractmethod
    def own_loss(self) -> Tensor | None:
        """What the calls since the last question add to a loss; None: nothing."""
