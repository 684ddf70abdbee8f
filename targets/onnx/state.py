"""The cache a model is traced with: fixed capacity, written by `reattend::cache_put`.

Layout letters: B batch, N new tokens, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from reattend.errors import RefusedError
from reattend.kernels.attention import attention as _attention  # noqa: F401  (registered here)
from reattend.kernels.cache_put import cache_put
from reattend.kernels.latent_attention import latent_attention as _latent  # noqa: F401
from reattend.kernels.routed_attention import routed_attention as _routed  # noqa: F401
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import Recorded
from reattend.targets.onnx.layout import KEEP_DENSE, GroupLayout, LayerLayout


class FixedState:
    """The state of one node: all rows of its tensors, and which of them count.

    `given` and `written`: tensors before and after the call, by input name.
    """

    def __init__(self, layout: GroupLayout, given: dict[str, Tensor], cache: FixedCache) -> None:
        self.layout, self.given, self.cache = layout, given, cache
        self.written: dict[str, Tensor] = {}

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, heads, N, width] rows after those seen; returns [B, heads, C, width]."""
        assert self.layout.second is not None
        return self._put(self.layout.first.input, first), self._put(
            self.layout.second.input, second
        )

    def _put(self, name: str, new: Tensor) -> Tensor:
        past = self.given.get(name)
        if past is None:  # a rotary part of width 0
            capacity = self.given[self.layout.first.input].shape[-2]
            return new.new_zeros(new.shape[0], new.shape[1], capacity, 0)
        one_head = past.dim() == 3
        rows, axis = (new.squeeze(1), 1) if one_head else (new, 2)
        kept: Tensor = cache_put(past, rows, self.cache.past_B, axis)
        self.written[name] = kept
        return kept.unsqueeze(1) if one_head else kept

    def places(self, n: int) -> Tensor:
        """Of n new tokens in their sequences [B, N], negative for padding."""
        start_B, length_B = self.span()
        return (length_B - start_B)[:, None] - n + torch.arange(n, device=start_B.device)

    def past(self) -> list[Tensor]:
        """The tensors before the call, for an op that writes them itself."""
        return [self.given[tensor.input] for tensor in self.layout.tensors]

    def put(self, *tensors: Tensor) -> None:
        """What such an op wrote."""
        for tensor, kept in zip(self.layout.tensors, tensors, strict=True):
            self.written[tensor.input] = kept

    def note(self, found: Tensor) -> None:
        """What the op gave for the layers behind, see `noted`."""
        self.cache.notes[self.layout.first.layer] = found

    def noted(self, pattern: HeadPattern) -> Tensor | None:
        """The tokens that the layer named by a pattern's selector noted; None: it names none.

        Raises:
            RefusedError: that layer noted none.
        """
        select = pattern.select
        if not isinstance(select, Recorded) or select.source is None:
            return None
        found = self.cache.notes.get(select.source)
        if found is None:
            raise RefusedError(
                f"layer {select.layer} reads the tokens that layer {select.source} chose,"
                " which chose none",
                next_step="convert both in one plan, whole blocks, with the same `at` and `topk`",
            )
        return found

    def seen(self) -> int:
        """Tokens before this call."""
        return self.cache.past

    def span(self) -> tuple[Tensor, Tensor]:
        """First real row and one past the last, per batch row."""
        return self.cache.start_B, self.cache.length_B


class FixedGroups:
    """The states of a layer's head groups, or of a group's classes of heads, kept apart.

    Nothing is packed or copied.
    """

    def __init__(self, parts: Sequence[FixedState | FixedGroups]) -> None:
        self.parts = parts

    def group(self, index: int) -> FixedState | FixedGroups:
        """The state of one group."""
        return self.parts[index]

    def update(self, first: Tensor, second: Tensor) -> NoReturn:
        """Refuse.

        Raises:
            RefusedError: always: every group has its own state.
        """
        raise RefusedError("the state of a layer with head groups was written as a whole")

    def seen(self) -> int:
        """Tokens before this call."""
        return self.parts[0].seen()

    def span(self) -> tuple[Tensor, Tensor]:
        """The same rows count in every group."""
        return self.parts[0].span()


class FixedCache(Cache):
    """What a model is given as `past_key_values` while it is exported.

    The model's own mask never matters: every layer reads `FixedState.span` instead.

    Args:
        layers: converted layers.
        states: state tensors by input name.
        mask_BT: 1 for real tokens, past ones included; padding is on the left.
        new: N, tokens of this call.
    """

    def __init__(
        self, layers: list[LayerLayout], states: dict[str, Tensor], mask_BT: Tensor, new: int
    ) -> None:
        super().__init__(layers=[])
        batch, total = mask_BT.shape
        self.past = total - new
        self.length_B = torch.full((batch,), total, dtype=torch.int64, device=mask_BT.device)
        self.past_B = self.length_B - new
        self.start_B = self.length_B - mask_BT.to(torch.int64).sum(-1)
        self.notes: dict[int, Tensor] = {}
        self.states = {
            layer.layer: [FixedState(group, states, self) for group in layer.groups]
            for layer in layers
        }

    def reattend_state(self, layer_idx: int) -> FixedState | FixedGroups:
        """The state of a converted layer; `Adapter` asks for it."""
        by_part: dict[int, list[FixedState]] = {}
        for state in self.states[layer_idx]:
            by_part.setdefault(state.layout.part, []).append(state)
        groups: list[FixedState | FixedGroups] = [
            FixedGroups(states) if states[0].layout.sparse else states[0]
            for states in by_part.values()
        ]
        return groups[0] if len(groups) == 1 else FixedGroups(groups)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this call."""
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the first new token."""
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys a mask of the model would cover, and their offset."""
        return self.past + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            RefusedError: always: only a layer that was not converted calls this.
        """
        layer = kwargs.get("layer_idx", args[2] if len(args) > 2 else "?")
        raise RefusedError(
            "a layer that was not converted keeps its own cache, which has no ONNX form",
            where=f"layer {layer}",
            next_step=KEEP_DENSE,
        )

    def written(self) -> list[Tensor]:
        """Every state tensor after the call, in the layout's order.

        Raises:
            RefusedError: a converted layer did not run or did not write its state.
        """
        found: list[Tensor] = []
        for index, parts in self.states.items():
            for state in parts:
                for tensor in state.layout.tensors:
                    if tensor.input not in state.written:
                        raise RefusedError(
                            "a converted layer did not write its state", where=f"layer {index}"
                        )
                    found.append(state.written[tensor.input])
        return found
