"""The description of a FlowingAttention: causal flow attention."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from reattend.mixers.linear_config import LinearConfig


class FlowingConfig(LinearConfig):
    """Flows between a token and those before it, in sums that every token changes once."""

    kind: Literal["flowing"] = "flowing"  # type: ignore[assignment]

    @model_validator(mode="after")
    def _counts_all(self) -> FlowingConfig:
        if self.direction != "causal" or not self.flow or self.window or self.decay:
            raise ValueError("a flowing state is causal, of all keys: no window, nothing decays")
        if (self.normalize, self.rope, self.state) != ("none", "before", "per-query-head"):
            raise ValueError("flows are divided by themselves, per query head, of rotated rows")
        return self

    @property
    def state_numbers(self) -> int:
        """The state, four sums of features and one of rivals, of every head."""
        return super().state_numbers + self.state_heads * (4 * self.features + 1)
