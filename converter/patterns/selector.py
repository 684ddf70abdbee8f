"""What every selector of keys answers, and the budgets that most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import ceil
from typing import Any, Literal

from pydantic import Field, model_validator

from reattend.mixers.config import CoreConfig, Frozen

#: Calls of one new token are decoding, all others are prefill.
Phase = Literal["prefill", "decode", "both"]


class Selector(Frozen, ABC):
    """One way to choose keys.

    Attributes:
        kind: the name of this one.
    """

    @property
    def acts(self) -> Phase:
        """In which calls keys are left out; in the others the block attends to every key."""
        return "both"

    @property
    def trained(self) -> bool:
        """Whether `finder: gate` trains it."""
        return False

    @property
    def calibrated(self) -> bool:
        """Whether it is set from calibration data, and stored with the weights."""
        return self.trained

    @property
    def depends_on_calls(self) -> bool:
        """Whether cached decoding and one pass over the same text differ, by design.

        Otherwise a query's choice depends on itself and the keys before it alone.
        """
        return self.acts != "both"

    def at_layer(self, layer: int) -> Selector:
        """As it is in this layer of a stack."""
        return self

    @abstractmethod
    def reads(self, length: int) -> int:
        """Keys that the last of `length` queries has selected, at most."""

    def covers(self, length: int) -> bool:
        """Whether nothing of so many keys is ever left out."""
        return False

    def sized(self, length: int) -> dict[str, Any]:
        """Keys and values of a plan with which something of so many keys is left out."""
        return {}

    def stored(self, core: CoreConfig) -> float:
        """Numbers per token and KV head that a cache holds beside keys and values."""
        return 0.0

    def held(self, core: CoreConfig) -> float:
        """Numbers per KV head that a cache holds however long the text is."""
        return 0.0

    def work(self, length: int, core: CoreConfig) -> float:
        """Multiply-adds per query head to choose for one new token, while decoding."""
        return 0.0

    def lesson(self, length: int, core: CoreConfig) -> tuple[float, float]:
        """Multiply-adds to score one token of a text of this length in training, and numbers held
        of it, per KV head."""
        return 0.0, 0.0

    def parameters(self, core: CoreConfig) -> int:
        """Weights of its own, per KV head."""
        return 0

    def misfit(self, core: CoreConfig) -> str | None:
        """Why a block cannot have this selector."""
        return None


class Budgeted(Selector):
    """Chooses the best of some units by exactly one rule.

    Attributes:
        topk: so many units.
        ratio: this share of the units a query may see, rounded up.
        topp: as few units as hold this share of the softmax over units.
        threshold: units whose softmax over units is at least this.
        measure: what `topp` counts shares of: the softmax, or how far scores are above the least.
    """

    topk: int | None = Field(default=None, gt=0)
    ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    topp: float | None = Field(default=None, gt=0.0, le=1.0)
    threshold: float | None = Field(default=None, ge=0.0, lt=1.0)
    measure: Literal["softmax", "range"] = "softmax"

    @model_validator(mode="after")
    def _one_budget(self) -> Budgeted:
        given = [b for b in (self.topk, self.ratio, self.topp, self.threshold) if b is not None]
        if len(given) != 1:
            raise ValueError("give exactly one budget: topk, ratio, topp or threshold")
        if self.measure == "range" and self.topp is None:
            raise ValueError("measure: range is for topp")
        return self

    def covers(self, length: int) -> bool:
        """By a number or a share; how many hold a share of the softmax is known at run time."""
        return (self.topp, self.threshold) == (None, None) and self.reads(length) >= length

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the tokens."""
        return self._quarter(length)

    def _quarter(self, many: int, least: int = 1) -> dict[str, Any]:
        return {"topk": max(least, many // 4)} if self.ratio is None else {"ratio": 0.25}

    def _quarter_of_blocks(self, length: int, block: int, least: int = 1) -> dict[str, Any]:
        """Of blocks that are small enough for at least 16."""
        small = min(block, max(1, length // 16))
        changed = {} if small == block else {"block": small}
        return changed | self._quarter(-(-length // small), least)

    def units(self, many: int) -> int:
        """Of so many units, how many are chosen at most."""
        if self.topk is not None:
            return min(self.topk, many)
        return many if self.ratio is None else ceil(self.ratio * many)
