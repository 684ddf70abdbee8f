"""Rows in order of their places, and what a cache holds of them: a window and a state.

A row of the batch counts its real tokens from its own first one, so padding moves nothing. Slot i
holds place ``first_B + i``, where all places before `first_B` are in the state.

Layout letters: B batch, N new tokens, L slots, R rows held, G KV heads, S heads of the state, f
features, c columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reattend.kernels.core import compute_dtype
from reattend.mixers.keeping import HoldingState
from reattend.mixers.linear_config import LinearConfig
from reattend.mixers.linear_window import first_visible
from reattend.mixers.places import places

Rows = tuple[Tensor, ...]


class Memory(NamedTuple):
    """What a cache holds of a block, whatever its length.

    `rows`: keys, values and what the state is made of where those are not the keys, [B, heads, R,
    width] each; `state_BSfc`; `count_B`: real tokens so far.
    """

    rows: Rows
    state_BSfc: Tensor
    count_B: Tensor


class Lined(NamedTuple):
    """New rows behind those that are held.

    `rows`: as in `Memory`, L slots; `slot_BN`: of each new token, -1 for padding; None: token i is
    in slot i. `place_BN`: its place. `before`: the state before slot 0, None: empty.
    """

    rows: Rows
    slot_BN: Tensor | None
    place_BN: Tensor
    before: Tensor | None

    def spread(self, x_BhNw: Tensor) -> Tensor:
        """What belongs to the new tokens, in their slots; zeros elsewhere."""
        return into_slots(x_BhNw, None, self.slot_BN, self.rows[0].shape[2])

    def gathered(self, x_BhLw: Tensor) -> Tensor:
        """What is in the slots of the new tokens."""
        if self.slot_BN is None:
            return x_BhLw
        index = self.slot_BN.clamp_min(0)[:, None, :, None]
        return x_BhLw.gather(2, index.expand(-1, x_BhLw.shape[1], -1, x_BhLw.shape[3]))


def mapped_rows(rows: Rows) -> Tensor:
    """What features are made of: the keys, or rows of their own."""
    return rows[2] if len(rows) > 2 else rows[0]


def into_slots(
    new_BhNw: Tensor, held_BhRw: Tensor | None, slot_BN: Tensor | None, length: int
) -> Tensor:
    """[B, h, L, w]: held rows first, then each new one in its slot; padding nowhere."""
    if slot_BN is None:
        return new_BhNw
    b, heads, _, width = new_BhNw.shape
    held = new_BhNw.new_zeros(b, heads, 0, width) if held_BhRw is None else held_BhRw
    rest = new_BhNw.new_zeros(b, heads, length + 1 - held.shape[2], width)
    index = torch.where(slot_BN < 0, length, slot_BN)[:, None, :, None]
    index = index.expand(-1, heads, -1, width)
    return torch.cat([held.to(new_BhNw.dtype), rest], 2).scatter(2, index, new_BhNw)[:, :, :length]


def lined(rows: Rows, valid_BN: Tensor | None, memory: Memory | None, c: LinearConfig) -> Lined:
    """The new rows [B, heads, N, width] in their slots."""
    b, _, n, _ = rows[0].shape
    device = rows[0].device
    if memory is None:
        place = places(valid_BN, n, device).expand(b, n)
        slot = None if valid_BN is None else place
        held: tuple[Tensor | None, ...] = (None,) * len(rows)
        length, before = n, None
    else:
        place = places(valid_BN, n, device, memory.count_B).expand(b, n)
        first_B = first_visible(memory.count_B, c.window, c.window_form)
        slot = torch.where(place < 0, -1, place - first_B[:, None])
        held, before = memory.rows, memory.state_BSfc
        length = held[0].shape[2] + n
    slots = tuple(into_slots(x, h, slot, length) for x, h in zip(rows, held, strict=True))
    return Lined(slots, slot, place, before)


def remembered(
    found: Lined,
    valid_BN: Tensor | None,
    memory: Memory | None,
    c: LinearConfig,
    features: Callable[[Tensor], Tensor],
    values: Callable[[Tensor], Tensor],
) -> Memory:
    """What is held after a call: places that no later query's window reaches go into the state.

    Args:
        found: of this call.
        valid_BN: which new tokens are real; None: all.
        memory: before the call.
        c: the block.
        features: rows of keys to features [B, S, .., f].
        values: rows of values to columns [B, S, .., c].
    """
    keys, n = found.rows[0], found.place_BN.shape[1]
    rows, new_B, leaving_B = kept_rows(found, valid_BN, memory, c)
    state = found.before
    if state is None:
        shape = (keys.shape[0], c.state_heads, c.features, c.columns)
        state = keys.new_zeros(shape, dtype=compute_dtype(keys.dtype))
    most = min(keys.shape[2], n if c.window_form == "sliding" else n + c.window)
    if n > 1 or c.window_form == "sliding" or bool((leaving_B > 0).any()):
        k, v = features(mapped_rows(found.rows)[:, :, :most]), values(found.rows[1][:, :, :most])
        state = absorbed(state, k, v, leaving_B, c.decay)
    return Memory(rows, state, new_B)


def kept_rows(
    found: Lined, valid_BN: Tensor | None, memory: Memory | None, c: LinearConfig
) -> tuple[Rows, Tensor, Tensor]:
    """Rows that a later window may reach, real tokens so far, and how many of `found` leave.

    Arguments as in `remembered`.
    """
    (b, n), length, device = found.place_BN.shape, found.rows[0].shape[2], found.rows[0].device
    zero_B = torch.zeros(b, dtype=torch.long, device=device)
    old_B = zero_B if memory is None else memory.count_B
    new_B = old_B + (n if valid_BN is None else valid_BN.sum(-1))
    leaving_B = first_visible(new_B, c.window, c.window_form)
    leaving_B = leaving_B - first_visible(old_B, c.window, c.window_form)
    index = leaving_B[:, None] + torch.arange(min(c.held_rows, length), device=device)
    index = index.clamp_max(length - 1)[:, None, :, None]
    rows = tuple(
        x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in found.rows
    )  # behind the last place stands what no query sees before it is written over
    return rows, new_B, leaving_B


def absorbed(
    state_BSfc: Tensor, k_BSmf: Tensor, v_BSmc: Tensor, count_B: Tensor, decay: tuple[float, ...]
) -> Tensor:
    """The state after the first `count_B` of m keys."""
    slot = torch.arange(k_BSmf.shape[2], device=k_BSmf.device)
    k = k_BSmf * (slot < count_B[:, None])[:, None, :, None]
    if decay:
        log_S = k.new_tensor(decay)
        since = (count_B[:, None] - 1 - slot).clamp_min(0)[:, None] * log_S[:, None]
        k = k * since.exp()[..., None]
        state_BSfc = state_BSfc * (count_B[:, None] * log_S).exp()[..., None, None]
    return state_BSfc + k.transpose(-1, -2) @ v_BSmc


def memory_of(state: HoldingState) -> Memory | None:
    """What a cache holds; None: nothing yet."""
    held = state.held()
    return None if held is None else Memory(held[:-2], *held[-2:])
