"""The description of a SelectiveAttention: a block whose projections feed a state-space model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reattend.mixers.recurrent_config import RecurrentConfig


class SelectiveConfig(RecurrentConfig):
    """Values, keys and queries are what a Mamba-2 layer calls x, B and C.

    Attributes:
        conv: tokens that the short convolution of each channel sees, its own among them.
    """

    kind: Literal["selective"] = "selective"  # type: ignore[assignment]
    conv: int = Field(default=4, gt=1)

    @model_validator(mode="after")
    def _is_plain(self) -> SelectiveConfig:
        if self.window or self.decay or self.decay_by != "none":
            raise ValueError("a selective state has no window, and decays by its own steps")
        if (self.feature_map, self.normalize, self.rope, self.state) != (
            "identity", "none", "window-only", "per-query-head",
        ):  # fmt: skip
            raise ValueError("a selective state reads queries and keys as they are projected")
        return self

    @property
    def tail(self) -> RecurrentConfig:
        """As rows are kept for the convolution: the last ones, as for a sliding window."""
        kept = {"window": self.conv - 1, "window_form": "sliding"}
        return RecurrentConfig.model_construct(**{**dict(self), **kept, "kind": "recurrent"})

    @property
    def channels(self) -> int:
        """Numbers of a token that the convolution sees."""
        core = self.core
        each = core.qk_head_dim + core.v_head_dim
        return core.heads * core.qk_head_dim + core.kv_heads * each

    def held_after(self, tokens: int) -> int:
        """Numbers that a cache holds after so many; no more than after `held_rows`."""
        return self.state_numbers + min(tokens, self.held_rows) * self.channels

    @property
    def held_rows(self) -> int:
        """Most rows that are kept for the convolution."""
        return self.conv - 1
