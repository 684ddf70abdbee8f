"""MixedAttention: head groups of different kinds in one block, around one cache and one o_proj.

Layout letters: B batch, N new tokens, M cached tokens, H query heads, G key/value groups of the
whole block, e value width, w width of a cached row.

A transformers cache holds two tensors per layer, so the groups' rows are packed side by side:
[B, 1, N, sum of heads x w] for each of the two, one `update` per layer; beams, padding, static
caches and cropping then stay transformers' own code. A state that keeps groups apart
(`GroupedState`, as in ONNX) is asked for each group instead, and nothing is packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from reattend.errors import UnsupportedCacheError
from reattend.mixers.base import (
    Context,
    GroupedState,
    Mixer,
    Rows,
    RowShapes,
    State,
)
from reattend.mixers.config import Frozen
from reattend.mixers.kinds import build_mixer


class GroupConfig(Frozen):
    """A head group: the block's KV groups it carries, and the mixer (without o_proj) that does."""

    kv_heads: tuple[int, ...]
    kind: str
    config: dict[str, Any]


class MixedConfig(Frozen):
    """The groups carry every KV group of the block exactly once."""

    kind: Literal["mixed"] = "mixed"
    groups: tuple[GroupConfig, ...]
    out_features: int | None
    out_bias: bool = False

    @model_validator(mode="after")
    def _covers(self) -> MixedConfig:
        heads = [g for group in self.groups for g in group.kv_heads]
        if not heads or sorted(heads) != list(range(len(heads))):
            raise ValueError("the groups must carry every KV group of the block exactly once")
        return self


class MixedAttention(Mixer):
    """Every group projects, attends and joins its own heads; the block's order is restored.

    Args:
        config: the groups and the projection.
        groups: mixers that are built already, in the order of `config.groups`; None: empty ones.
    """

    kind = "mixed"
    config: MixedConfig

    def __init__(self, config: MixedConfig, groups: Sequence[Mixer] | None = None) -> None:
        super().__init__()
        self.config = config
        self.groups = nn.ModuleList(
            [build_mixer(g.kind, g.config) for g in config.groups] if groups is None else groups
        )
        self.o_proj = nn.Identity()
        if config.out_features is not None:
            width = sum(group.joined_width for group in self.head_groups)
            self.o_proj = nn.Linear(width, config.out_features, config.out_bias)

    @property
    def head_groups(self) -> Sequence[Mixer]:
        """The groups, in the order of the config."""
        return [g for g in self.groups if isinstance(g, Mixer)]

    @property
    def query_heads(self) -> int:
        """H of the whole block."""
        return sum(group.query_heads for group in self.head_groups)

    @property
    def joined_width(self) -> int:
        """H e of the whole block."""
        return sum(group.joined_width for group in self.head_groups)

    @property
    def keeps(self) -> bool:
        """Whether any group chooses which of its rows stay."""
        return any(group.keeps for group in self.head_groups)

    @property
    def cross(self) -> bool:
        """Groups of one block read the same streams."""
        return any(group.cross for group in self.head_groups)

    @property
    def row_shapes(self) -> RowShapes:
        """The packed rows: one head each, as wide as all groups together."""
        first, second = (sum(h * w for h, w in shapes) for shapes in self._shapes())
        return (1, first), (1, second)

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """A list over groups for each of the two."""
        made = [group.project(x_BND, source_BMD, ctx, state) for group in self.head_groups]
        return [query for query, _ in made], [rows for _, rows in made]

    def store(self, new: Any, state: State) -> Any:
        """Each group's rows: in its own state, or packed into one update.

        Raises:
            UnsupportedCacheError: a group keeps more than rows and the state has no place for it.
        """
        pairs = list(zip(self.head_groups, new, strict=True))
        if isinstance(state, GroupedState):
            return [group.store(rows, state.group(i)) for i, (group, rows) in enumerate(pairs)]
        for group, _ in pairs:
            if type(group).store is not Mixer.store:
                raise UnsupportedCacheError(
                    f"a head group of kind {group.kind} keeps a state of its own, which does not "
                    f"fit into a cache of rows",
                    next_step="run without a cache, or convert the whole block to one kind",
                )
        return self.unpack(state.update(_packed(new, 0), _packed(new, 1)))

    def unpack(self, stored: Rows) -> Any:
        """[B, 1, M, sum] twice -> for each group its two tensors [B, heads, M, w]."""
        parts = [
            [
                _heads(part, heads, width)
                for part, (heads, width) in zip(
                    packed[:, 0].split([h * w for h, w in shapes], -1), shapes, strict=True
                )
            ]
            for packed, shapes in zip(stored, self._shapes(), strict=True)
        ]
        return list(zip(*parts, strict=True))

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> list[Tensor]:
        """[B, H_g, N, e] of every group."""
        found = []
        for i, group in enumerate(self.head_groups):
            heads = self._query_heads(i)
            mask = ctx.mask
            if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:  # one mask per head
                mask = mask[:, heads]
            found.append(group.attend(query[i], rows[i], replace(ctx, mask=mask), span))
        return found

    def join(self, heads: Any, x_BND: Tensor) -> Tensor:
        """Every group's heads side by side, in the block's own order: [B, N, H e]."""
        places: dict[int, Tensor] = {}
        for group, described, y in zip(self.head_groups, self.config.groups, heads, strict=True):
            joined = group.join(y, x_BND)
            each = joined.shape[-1] // len(described.kv_heads)
            for at, length in runs(described.kv_heads):
                first = described.kv_heads[at]
                places[first] = joined.narrow(-1, at * each, length * each)
        return torch.cat([places[first] for first in sorted(places)], -1)

    def score_bias(self, n: int, m: int, offset: int) -> Tensor | None:
        """The groups' biases in the block's order of heads; zeros where a group has none."""
        found = [group.score_bias(n, m, offset) for group in self.head_groups]
        some = next((bias for bias in found if bias is not None), None)
        if some is None:
            return None
        whole = some.new_zeros(1, self.query_heads, n, m)
        for i, bias in enumerate(found):
            if bias is not None:
                whole[:, self._query_heads(i)] = bias
        return whole

    @property
    def adds_bias(self) -> bool:
        """Whether any group does."""
        return any(group.adds_bias for group in self.head_groups)

    def _shapes(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(heads, width) of every group's first and second tensor."""
        shapes = [group.row_shapes for group in self.head_groups]
        return [first for first, _ in shapes], [second for _, second in shapes]

    def _query_heads(self, index: int) -> list[int]:
        """The query heads of a group, as the block counts them."""
        kv_heads = self.config.groups[index].kv_heads
        each = self.head_groups[index].query_heads // len(kv_heads)
        return [g * each + i for g in kv_heads for i in range(each)]


def runs(kv_heads: Sequence[int]) -> list[tuple[int, int]]:
    """(place, length) of the longest pieces that count up by one."""
    found: list[tuple[int, int]] = []
    for at, head in enumerate(kv_heads):
        if found and head == kv_heads[at - 1] + 1:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((at, 1))
    return found


def _packed(new: Sequence[Rows], which: int) -> Tensor:
    """One of the two tensors of every group, side by side: [B, 1, N, sum of heads x w]."""
    return torch.cat([rows[which].transpose(1, 2).flatten(2) for rows in new], -1)[:, None]


def _heads(part_BMp: Tensor, heads: int, width: int) -> Tensor:
    """[B, M, heads x w] -> [B, heads, M, w], a view."""
    split: Tensor = part_BMp.unflatten(-1, (heads, width))
    return split.transpose(1, 2)
