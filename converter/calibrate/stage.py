"""What a stage of calibration is: a way to turn a batch into losses and gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from reattend.calibrate.ranks import Ranks
from reattend.calibrate.working import Working
from reattend.errors import ModelError
from reattend.mixers.base import Mixer
from reattend.mixers.schooling import Schooled


@dataclass
class StageResult:
    """What one stage did.

    Attributes:
        name: `layerwise` or `end-to-end`.
        tokens: real tokens seen.
        loss: (tokens seen, mean loss since the point before), at most about 200 points.
        loss_name: what the loss is, with its unit.
        sites: per site (layerwise) or "" (end-to-end): loss of the first batch, before any
            update, and the running mean over about the last ten steps.
        reused: nothing was trained now: an interrupted run had finished the stage.
    """

    name: str
    tokens: int
    loss: list[tuple[int, float]]
    loss_name: str
    sites: dict[str, tuple[float, float]] = field(default_factory=dict)
    reused: bool = field(default=False, compare=False)


class Stage(ABC):
    """One stage over working copies.

    Attributes:
        groups: label -> names of the parameters trained together; gradients are clipped, and
            updates skipped, per group. Layerwise has one group per site, so sites do not
            influence each other.
        fresh: names of weights that hold nothing of the original's at the start.
        floor: a loss that rounding alone explains. AdamW divides the gradient by its own size,
            so on rounding noise it would walk away from an exact start at full speed; a group
            whose loss is below the floor is not updated.
        far: first loss from which on `lr` is taken in full; nearer starts walk more slowly.
    """

    name: ClassVar[str]
    loss_name: ClassVar[str]
    lr: ClassVar[float]
    floor: ClassVar[float]
    far: ClassVar[float]

    def __init__(self, working: Working, ranks: Ranks) -> None:
        self.working, self.ranks = working, ranks
        new = {id(p) for m in mixers(working.student) for p in m.fresh()}
        self.fresh = {name for name, master in working.masters.items() if id(master) in new}
        self.groups: dict[str, list[str]] = {}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What this stage trains, by name."""
        return {n: self.working.masters[n] for names in self.groups.values() for n in names}

    @abstractmethod
    def accumulate(self, inputs: dict[str, Tensor], silent: bool) -> dict[str, Tensor]:
        """Add this batch's gradients to `.grad`; returns the loss of every group.

        Args:
            inputs: this process' rows.
            silent: run, but count no token.
        """

    @property
    def anneals(self) -> bool:
        """Whether some mixer starts nearer to the original than it will end."""
        return any(mixer.anneals for mixer in schooled(self.working.student))

    def trained(self, share: float) -> None:
        """Tell every mixer which share of the training is done."""
        for mixer in schooled(self.working.student):
            mixer.trained(share)

    def backward(self, loss: Tensor, module: nn.Module, silent: bool) -> None:
        """Gradients of this process' loss and of what the mixers below a module add to it."""
        own = [extra for mixer in schooled(module) if (extra := mixer.own_loss()) is not None]
        if own and not silent:
            loss = loss + torch.stack(own).sum().to(loss.device) / self.ranks.world
        loss.backward()

    def close(self) -> None:  # noqa: B027  (most stages have nothing to undo)
        """Make `working.masters` whole again; called once, after the last step."""

    def blame(self, group: str) -> str:
        """The site to name when the loss of `group` is not a number."""
        return group


def mixers(module: nn.Module) -> Iterator[Mixer]:
    """Every mixer below a module, and those that are parts of others."""
    return (m for m in module.modules() if isinstance(m, Mixer))


def schooled(module: nn.Module) -> Iterator[Schooled]:
    """Every mixer below a module that wants to be told of training."""
    return (m for m in module.modules() if isinstance(m, Schooled))


def counted(real: Tensor | None, like: Tensor, silent: bool) -> Tensor | None:
    """`real`, or all-False where this process' rows do not count."""
    if not silent:
        return real
    return torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device)


def finite_or_raise(tensor: Tensor, where: str, real: Tensor | None) -> None:
    """Check the *original's* values at real tokens.

    Raises:
        ModelError: they are not numbers: no calibration can help.
    """
    kept = tensor if real is None else tensor[real]
    if not bool(torch.isfinite(kept.sum())) and not bool(torch.isfinite(kept).all()):
        raise ModelError(
            "the original model produces NaN or infinity on the calibration data",
            where=where,
            next_step="check the original's weights and the data",
        )
