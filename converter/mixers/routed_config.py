"""The description of a RoutedAttention: a block, and which of its heads every token uses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reattend.mixers.config import BlockConfig


class RoutedConfig(BlockConfig):
    """A unit is a query head, a KV group with all query heads that read it, or an expert (`route`).

    The first `shared` units, counted in the block's own order, are used by every token; of the
    rest each token uses the `top_k` that its router ranks highest. `order`: the number that each KV
    group had in the original block. For training: the share of its tokens over which all routed
    units become `top_k`, and the weight of the loss that spreads tokens over units.

    `experts` blocks of the same sizes, of which every token uses all, weighed by a softmax: heads
    are ordered by the KV group of the block they came from, `tiles` such groups, and there by
    expert.
    """

    kind: Literal["routed"] = "routed"
    route: Literal["kv-group", "head", "expert"]
    shared: int = Field(ge=0)
    top_k: int = Field(ge=0)
    router: Literal["linear", "qnorm"] = "linear"
    gate_by: Literal["weighted", "hard"] = "weighted"
    order: tuple[int, ...]
    anneal: float = Field(default=0.0, ge=0, le=1)
    balance_loss: float = Field(default=0.0, ge=0)
    experts: int = Field(default=1, ge=1)
    tiles: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> RoutedConfig:
        if self.shared > self.units or self.top_k > self.routed:
            raise ValueError("a block cannot use more heads than it has")
        if self.routed and not self.top_k:
            raise ValueError("every token must use one of the routed heads at least")
        if sorted(self.order) != list(range(self.core.kv_heads)):
            raise ValueError("`order` must name every KV group of the original once")
        return self

    @property
    def units(self) -> int:
        """What is routed or shared, U."""
        if self.route == "expert":
            return self.experts
        return self.core.heads if self.route == "head" else self.core.kv_heads

    @property
    def routed(self) -> int:
        """Units that a token may leave out, R."""
        return self.units - self.shared

    @property
    def heads_per_unit(self) -> int:
        """Query heads of a unit."""
        return self.core.heads // self.units

    @property
    def active(self) -> float:
        """Share of the query heads that a token uses."""
        return (self.shared + self.top_k) / self.units
