"""`to: dense`: the identity. The block becomes the normal form and nothing else changes.

It is the proof that finding, rewriting and installing are right.
"""

from __future__ import annotations

from typing import Any

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, dense_cost


class DenseOptions(Frozen):
    """No options."""


class ToDense(Conversion):
    """Exact for every block that was found."""

    name = "dense"
    Options = DenseOptions
    shared = True

    def check(self, config: DenseConfig, options: Any) -> Refusal | None:
        """Always legal."""
        return None

    def build(self, dense: DenseAttention, statistics: Any, options: Any) -> Built:
        """The normal form itself."""
        return Built(dense, "exact", {})

    def outcome(self, config: DenseConfig, options: Any) -> DenseConfig:
        """The block as it is."""
        return config

    def exact_setting(self, config: DenseConfig) -> DenseOptions:
        """The only setting."""
        return DenseOptions()

    def cost(self, config: DenseConfig, options: Any) -> Cost:
        """Unchanged."""
        return dense_cost(config)
