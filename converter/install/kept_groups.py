"""A cache layer of head groups, where some groups choose which of their rows stay.

Each group has a layer of its own: a `KeptLayer` where it chooses, a `HeldLayer` where it holds a
state, else one like the layer that was replaced. All of them have seen the same tokens.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reattend.errors import UnsupportedCacheError
from reattend.install.held import HeldLayer
from reattend.install.kept import KeptLayer, KeptState, take_layer
from reattend.mixers.base import Kept
from reattend.mixers.sparse_config import SparseConfig


class GroupedLayer(KeptLayer):
    """The groups' layers, by their place in `Mixer.head_groups`."""

    def __init__(self, replaced: DynamicLayer) -> None:
        super().__init__(replaced)
        self.groups: dict[int, DynamicLayer] = {}

    def of(self, index: int, kind: type[KeptLayer] | None = None) -> DynamicLayer:
        """The layer of one group, made when it first asks; without a kind, one that keeps all."""
        if index not in self.groups:
            made = copy.deepcopy(self.replaced)
            self.groups[index] = made if kind is None else kind(made)
        return self.groups[index]

    @property
    def rows(self) -> list[Tensor]:
        """The keys and values of every group."""
        found = []
        for layer in self.groups.values():
            own = layer.rows if isinstance(layer, KeptLayer) else [layer.keys, layer.values]
            found += [t for t in own if isinstance(t, Tensor)]
        return found

    def get_seq_length(self) -> int:
        """Tokens so far; every group has seen them."""
        return next((int(g.get_seq_length()) for g in self.groups.values()), 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the replaced layer would answer."""
        self.total = self.get_seq_length()
        return super().get_mask_sizes(query_length)

    def activate_past_recording(self) -> None:
        """See `KeptLayer`."""
        self._all("activate_past_recording")

    def crop(self, tokens_to_remove: int) -> None:
        """See `KeptLayer`."""
        self._all("crop", tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self._all("reset")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._all("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch `repeats` times."""
        self._all("batch_repeat_interleave", repeats)

    def offload(self) -> None:
        """To the processor's memory."""
        self._all("offload")

    def prefetch(self) -> None:
        """Back to the device of the model."""
        self._all("prefetch")

    def _all(self, call: str, *args: Any) -> None:
        for layer in self.groups.values():
            if hasattr(layer, call):
                getattr(layer, call)(*args)


class GroupState(KeptState):
    """The state of one head group."""

    def __init__(self, layer: GroupedLayer, index: int) -> None:
        self.layer, self.index = layer, index

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows that all stay."""
        keys, values = self.layer.of(self.index).update(first, second)
        return keys, values

    def keep(
        self, keys: Tensor, values: Tensor, valid_BN: Tensor | None, config: SparseConfig
    ) -> list[Kept]:
        """See `KeepingState`."""
        layer: Any = self.layer.of(self.index, KeptLayer)
        found: list[Kept] = layer.update(keys, values, valid_BN=valid_BN, config=config)[0]
        return found

    def held(self) -> tuple[Tensor, ...] | None:
        """See `HoldingState`."""
        layer: Any = self.layer.of(self.index, HeldLayer)
        found: tuple[Tensor, ...] | None = layer.tensors
        return found

    def hold(self, tensors: tuple[Tensor, ...], tokens: int) -> None:
        """See `HoldingState`."""
        layer: Any = self.layer.of(self.index, HeldLayer)
        layer.hold(tensors, tokens)

    def seen(self) -> int:
        """Tokens so far."""
        return self.layer.get_seq_length()


class GroupedKeptState(KeptState):
    """One layer of a transformers DynamicCache, for a mixer of several head groups.

    Raises:
        UnsupportedCacheError: as `KeptState`, or the cache offloads its layers.
    """

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx
        self.filled_only = False
        if getattr(cache, "offloading", False):
            raise UnsupportedCacheError(
                "a block of several head groups was given a cache that offloads its layers",
                where=f"layer {layer_idx}",
                next_step="pass a plain DynamicCache, or use_cache=False",
            )
        self.layer = take_layer(cache, layer_idx, GroupedLayer)

    def group(self, index: int) -> GroupState:
        """See `GroupedState`."""
        return GroupState(self.layer, index)
