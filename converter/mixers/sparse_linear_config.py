"""The description of a SparseLinearAttention: the best blocks of the past, and a sum of it."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from reattend.mixers.recurrent_config import RecurrentConfig


class SparseLinearConfig(RecurrentConfig):
    """Every row is kept, and a state beside them: fewer keys are read, memory is not saved."""

    kind: Literal["sparse-linear"] = "sparse-linear"  # type: ignore[assignment]

    @model_validator(mode="after")
    def _sums_the_rest(self) -> SparseLinearConfig:
        if not self.projects or self.window or self.decay or self.decay_by != "none":
            raise ValueError("a share of blocks is chosen; no window, and nothing decays")
        if self.rope != "before":
            raise ValueError("rows are kept once: features are made of rotated ones")
        return self

    def held_after(self, tokens: int) -> int:
        """Numbers that a cache holds after so many: rows, means of whole blocks, the state."""
        core = self.core
        rows = tokens * (core.qk_head_dim + core.v_head_dim)
        means = tokens // self.sparse_block * core.qk_head_dim
        return self.state_numbers + core.kv_heads * (rows + means)
