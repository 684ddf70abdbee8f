"""Block layouts of static patterns, made once for all layers and models that have the pattern.

A layout depends on a pattern, on the block's own pattern and on how many blocks the tokens fill,
not on the layer. Each block's `Layouts` holds on to those it asked for, and what nobody holds any
more is freed. Where queries look back only, the layout of a shorter text is the upper part of a
longer one's, so one layout serves every length, and grows by the rows it lacks.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern

if TYPE_CHECKING:  # the op is imported when a block first runs it
    from reattend.kernels.sparse_attention import BlockLayout

BLOCK = 64
#: share of the block's own pairs above which a mask is as fast
DENSE = 0.6
#: bytes of all layouts together, above which those that were not asked for lately are dropped
MOST_BYTES = 1 << 30
#: asked for so many others since: more than the layers and head classes of one call
LATELY = 4096
#: lengths that a block holds on to, of a pattern that looks ahead
LENGTHS = 8

Key = tuple[HeadPattern, str, int, int, int]


class Grown:
    """The layouts of one pattern, as long as the longest text so far, on every device asked for."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.asked = 0
        self.host: BlockLayout | None = None
        self.pairs_P = torch.zeros(1, dtype=torch.int64)  # visible up to each row
        self.copies: dict[torch.device, BlockLayout] = {}
        self.views: dict[tuple[torch.device, int], BlockLayout] = {}
        self.dense: deque[range] = deque(maxlen=LENGTHS)  # blocks of texts for which none pays

    def get(
        self, pattern: HeadPattern, core: CoreConfig, n: int, device: torch.device
    ) -> BlockLayout | None:
        """The layout of one head for n tokens; None where it would not pay."""
        blocks = -(-n // BLOCK)
        with self.lock:
            found = self.views.get((device, blocks))
            if found is not None:
                return found
            if any(blocks in known for known in self.dense):
                return None
            # a tensor of inference mode could not be kept for a gradient later
            with torch.inference_mode(False), torch.no_grad(), _on_the_host():
                self._grow(pattern, core, blocks)
                most = DENSE * (0.5 if core.causal else 1.0) * n * n
                if int(self.pairs_P[blocks]) > most:
                    self.drop()
                    self.dense.append(range(blocks, blocks + blocks // 8 + 1))
                    return None
                found = self._upper(blocks, device)
            while len(self.views) >= LENGTHS:
                del self.views[next(iter(self.views))]
            self.views[device, blocks] = found
        POOL.make_room(self)  # takes other locks: not inside of this one
        return found

    @property
    def bytes(self) -> int:
        """Held by the tensors, on all devices."""
        held = [x for x in (self.host, *tuple(self.copies.values())) if x is not None]
        storages = {t.untyped_storage().data_ptr(): t.nbytes for x in held for t in x.tensors}
        return sum(storages.values())

    def drop(self) -> None:
        """Forget the tensors; they are made again when asked for."""
        with self.lock:
            self.host, self.copies, self.views = None, {}, {}

    def _grow(self, pattern: HeadPattern, core: CoreConfig, blocks: int) -> None:
        from reattend.patterns.layouts import below, block_layout

        held = 0 if self.host is None else self.host.row_ptr.shape[1] - 1
        if held >= blocks:
            return
        more = block_layout([pattern], [0], core, blocks * BLOCK, start=held * BLOCK, block=BLOCK)
        self.host = more if self.host is None else below(self.host, more)
        self.pairs_P = self.host.pairs_before()
        self.copies, self.views = {}, {}

    def _upper(self, blocks: int, device: torch.device) -> BlockLayout:
        """The first rows, on a device; no copy."""
        from reattend.kernels.sparse_attention import BlockLayout

        assert self.host is not None
        if device not in self.copies:
            self.copies[device] = self.host.to(device)
        entries, whole = int(self.host.row_ptr[0, blocks]), self.copies[device]
        return BlockLayout(
            BLOCK, 0, whole.row_ptr[:, : blocks + 1], whole.col[:entries], whole.tile[:entries],
            whole.tiles, whole.head_layout,
        )  # fmt: skip


def _on_the_host() -> AbstractContextManager[object]:
    """Under another default device tensors are made here; the mode slows every operation."""
    host = torch.device("cpu")
    return nullcontext() if torch.get_default_device() == host else host


class Pool:
    """All layouts of this process that a block holds on to."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.grown: WeakValueDictionary[tuple[Key, int], Grown] = WeakValueDictionary()
        self.turns = count(1)

    def of(self, key: Key, blocks: int) -> Grown:
        """The one for a pattern; `blocks` where every length has its own."""
        with self.lock:
            found = self.grown.get((key, blocks))
            if found is None:
                found = self.grown[key, blocks] = Grown()
            return found

    def make_room(self, new: Grown) -> None:
        """Drop what was not asked for lately while there is too much; then the new one itself.

        Not the least recent one: a call that needs more than there is room for would build all its
        layouts anew each time, and not only those that find no room.
        """
        with self.lock:
            every = list(self.grown.values())
        held = {one: one.bytes for one in sorted(every, key=lambda one: one.asked)}
        old = [one for one in held if new.asked - one.asked > LATELY]
        for one in (*old, new):
            if sum(held.values()) <= MOST_BYTES:
                return
            one.drop()
            held[one] = 0


POOL = Pool()


class Layouts:
    """What one block asks for layouts; copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.kept: dict[Key, dict[int, Grown]] = {}

    def __reduce__(self) -> tuple[type[Layouts], tuple[()]]:
        """A copy of a model finds the layouts among those of this process, or makes its own."""
        return Layouts, ()

    def get(
        self, pattern: HeadPattern, core: CoreConfig, n: int, device: torch.device
    ) -> BlockLayout | None:
        """The layout of one head for n tokens; None where it would not pay."""
        key = (pattern, core.pattern, core.window, core.chunk, BLOCK)
        own = 0 if core.causal else -(-n // BLOCK)
        mine = self.kept.setdefault(key, {})
        grown = mine.get(own)
        if grown is None:
            grown = POOL.of(key, own)
            with POOL.lock:
                mine[own] = grown
                while len(mine) > LENGTHS:
                    del mine[next(iter(mine))]
        grown.asked = next(POOL.turns)
        return grown.get(pattern, core, n, device)
