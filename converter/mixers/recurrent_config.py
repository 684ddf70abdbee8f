"""The description of a RecurrentAttention: every key enters the state at once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reattend.mixers.linear_config import LinearConfig


class RecurrentConfig(LinearConfig):
    """A state of every key so far, and beside it, with an output of its own, a window.

    `mix` is here the share of the window's output in the sum of both.

    Attributes:
        decay_by: what decides how much of the state a token leaves: `none`, only `decay`; `keys`,
            the sigmoid of the numbers that its key's features are made of, one for each of them.
        gate_divisor: those logarithms are divided by it.
    """

    kind: Literal["recurrent"] = "recurrent"  # type: ignore[assignment]
    decay_by: Literal["none", "keys"] = "none"
    gate_divisor: float = Field(default=16.0, gt=0.0)

    @model_validator(mode="after")
    def _is_gated_once(self) -> RecurrentConfig:
        if self.direction != "causal":
            raise ValueError("a state that every key enters in order is causal")
        if self.decay_by == "keys" and self.decay:
            raise ValueError("a state decays by its keys, or by fixed numbers")
        if self.decay_by == "keys" and self.features != self.core.qk_head_dim:
            raise ValueError("a gate of keys needs as many features as a key has numbers")
        return self

    def held_after(self, tokens: int) -> int:
        """Numbers that a cache holds after so many; no more than after `held_rows`."""
        core = self.core
        rows = min(tokens, self.held_rows) * core.kv_heads
        return self.state_numbers + rows * (core.qk_head_dim + core.v_head_dim)
