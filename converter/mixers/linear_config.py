"""The description of a LinearAttention: a block, its window, and what reaches further back."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reattend.mixers.config import BlockConfig
from reattend.mixers.everywhere_config import EverywhereConfig

FeatureMapName = Literal[
    "identity", "elu+1", "relu", "exp", "softmax", "silu", "hedgehog", "hedgehog-fla", "t2r",
    "sigmoid", "mlp", "performer",
]  # fmt: skip
WindowForm = Literal["terraced", "sliding"]
#: maps with weights of their own
LEARNED = ("hedgehog", "hedgehog-fla", "t2r")
#: of these, maps with a bias, and maps of two features for each row
BIASED, DOUBLED = ("hedgehog-fla", "t2r"), ("hedgehog", "hedgehog-fla")


class LinearConfig(BlockConfig, EverywhereConfig):
    """Keys in the window are attended to by softmax, older ones through a state of fixed size.

    Attributes:
        direction: `causal`; or `bidirectional`: every token sees all, and there is one sum.
        feature_map: what makes features of a query or key (`reattend.mixers.features`).
        feature_dim: rows of its weights; the head width where it has none.
        normalize: what linear sums are divided by: `sum`, the sum of the weights, shared with the
            window; `group`, their own root mean square per head, mean removed; `rms`, that of all
            heads together; `none`.
        decay: natural logarithm of what a token leaves of the state, per head of the state; empty:
            all of it.
        window: w, tokens. 0: none.
        window_form: `sliding`: the last w keys; `terraced`: the keys of the query's own w tokens,
            counted from the first, and of the w before them.
        mix: weight of the window against the older keys, between 0 and 1; where it starts, if it is
            `learned`.
        blended: the older keys' weight is one less that, m to 1 - m; otherwise it is one.
        rope: what the older keys and their queries are: rotated, then mapped (`before`); mapped,
            then rotated (`after`); not rotated (`window-only`).
        state: whether each query head has a state, or each KV head.
    """

    kind: Literal["linear"] = "linear"
    direction: Literal["causal", "bidirectional"] = "causal"
    feature_map: FeatureMapName
    feature_dim: int = Field(gt=0)
    normalize: Literal["sum", "group", "rms", "none"] = "sum"
    decay: tuple[float, ...] = ()
    window: int = Field(default=0, ge=0)
    window_form: WindowForm = "terraced"
    mix: float = Field(default=0.5, gt=0.0, lt=1.0)
    mix_learned: bool = False
    blended: bool = False
    rope: Literal["before", "after", "window-only"] = "before"
    state: Literal["per-query-head", "per-kv-head"] = "per-query-head"

    @model_validator(mode="after")
    def _fits(self) -> LinearConfig:
        if self.decay and len(self.decay) != self.state_heads:
            raise ValueError("`decay` must have one number per head of the state")
        if self.direction == "bidirectional" and (self.window or self.decay):
            raise ValueError("a bidirectional block has one sum: no window, and nothing decays")
        if any(d > 0 for d in self.decay):
            raise ValueError("a state cannot grow by itself: decays are at most 0")
        return self

    @property
    def state_heads(self) -> int:
        """Heads of the state, S."""
        return self.core.heads if self.state == "per-query-head" else self.core.kv_heads

    @property
    def features(self) -> int:
        """Features of a query or key, f."""
        return self.feature_dim * (2 if self.feature_map in DOUBLED else 1)

    @property
    def columns(self) -> int:
        """Columns of the state: values, and the sum of weights where it is needed."""
        return self.core.v_head_dim + (1 if self.normalize == "sum" else 0)

    @property
    def state_numbers(self) -> int:
        """Numbers of a sequence's state."""
        return self.state_heads * self.features * self.columns

    @property
    def held_rows(self) -> int:
        """Most rows of keys and values that are kept for the window."""
        return self.window * (2 if self.window_form == "terraced" else 1)

    def held_after(self, tokens: int) -> int:
        """Numbers that a cache holds after so many; no more than after `held_rows`."""
        core = self.core
        each = core.qk_head_dim * (2 if self.rope == "window-only" else 1) + core.v_head_dim
        return self.state_numbers + min(tokens, self.held_rows) * core.kv_heads * each
