"""The description of a SparseAttention: a block, and what each of its KV heads sees."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from reattend.mixers.config import BlockConfig, Frozen
from reattend.patterns.pattern import HeadPattern


class HeadClass(Frozen):
    """KV heads (with the query heads that read them) that share a pattern.

    Attributes:
        kv_heads: numbers of the KV heads, from 0.
        pattern: what they see.
    """

    kv_heads: tuple[int, ...] = Field(min_length=1)
    pattern: HeadPattern


class SparseConfig(BlockConfig):
    """The classes carry every KV head once; `evict`: caches forget what no later query sees."""

    kind: Literal["sparse"] = "sparse"
    classes: tuple[HeadClass, ...]
    evict: bool = True

    @model_validator(mode="after")
    def _covers(self) -> SparseConfig:
        heads = sorted(h for c in self.classes for h in c.kv_heads)
        if heads != list(range(self.core.kv_heads)):
            raise ValueError("the classes must carry every KV head of the block exactly once")
        return self
