"""The contract of a selecting method, and what it may say: which keys, which lines, which blocks.

A method never sees padding: the frame hands it rows of the batch that have equally many real
tokens, cut to those, so key j is at position j and query i at position `first + i`.

Layout letters: B rows, H query heads, G key/value heads, N queries, M keys, d key head width, P
query blocks, Q key blocks, R rows of a map, w width of a summary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from reattend.errors import ArgumentError
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern


class Notes(Protocol):
    """A place in the cache for what a layer chose, for these rows of the batch."""

    def write(self, found: Tensor) -> None:
        """[B, H, 1, K] in place of what was there."""
        ...

    def read(self) -> Tensor | None:
        """What was written last."""
        ...


@dataclass(frozen=True)
class Asked:
    """What one call asks of a method.

    Attributes:
        q_BHNd, k_BGMd: queries and all keys so far, real tokens only.
        core: the heads asked about; its own pattern is the outermost limit.
        summaries_BGQw: of every whole block of keys, where the method has a `summary` and the
            call has a cache; None: the method makes what it needs from the keys.
        notes: what a layer's method wrote into the cache; None: there is no cache.
        v_BGMe: values, for methods that look at them.
    """

    q_BHNd: Tensor
    k_BGMd: Tensor
    core: CoreConfig
    summaries_BGQw: Tensor | None = None
    notes: Notes | None = None
    v_BGMe: Tensor | None = None

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.k_BGMd.shape[2] - self.q_BHNd.shape[2]

    def positions(self) -> tuple[Tensor, Tensor]:
        """Of queries [N, 1] and keys [1, M]."""
        m, device = self.k_BGMd.shape[2], self.k_BGMd.device
        return torch.arange(self.first, m, device=device)[:, None], torch.arange(m, device=device)[
            None
        ]

    def scores(self, q_BHNd: Tensor, k_BGMd: Tensor) -> Tensor:
        """See `products`."""
        return products(q_BHNd, k_BGMd, self.core)

    def whole(self, block: int) -> Whole:
        """All whole blocks, of a call that holds every query."""
        assert self.first == 0 and self.v_BGMe is not None
        end = self.k_BGMd.shape[2] // block * block
        k, v, q = (
            x[:, :, :end].unflatten(2, (-1, block)) for x in (self.k_BGMd, self.v_BGMe, self.q_BHNd)
        )
        return Whole(k, v, q, 0, self.k_BGMd[:, :, :end])


@dataclass(frozen=True)
class Whole:
    """Whole blocks of c tokens, for their summaries.

    Attributes:
        k_BGQcd, v_BGQce: of these blocks.
        q_BHQcd: None where the method does not recall queries.
        number: of the first of these blocks.
        k_BGMd: all keys so far.
    """

    k_BGQcd: Tensor
    v_BGQce: Tensor
    q_BHQcd: Tensor | None
    number: int
    k_BGMd: Tensor


def products(q_BHNd: Tensor, k_BGMd: Tensor, core: CoreConfig) -> Tensor:
    """Scaled products [B, H, N, M], capped as the block does, float32 or wider."""
    rows = q_BHNd.unflatten(1, (k_BGMd.shape[1], -1)).flatten(2, 3)
    s = (rows @ k_BGMd.transpose(-1, -2)).view(*q_BHNd.shape[:3], k_BGMd.shape[2]) * core.scale
    wide = s if s.dtype == torch.float64 else s.float()
    return core.softcap * torch.tanh(wide / core.softcap) if core.softcap else wide


class Chosen(ABC):
    """Which keys each query has selected; the block's own pattern is not applied to it."""

    @abstractmethod
    def mask(self) -> Tensor:
        """Token by token, bool [B or 1, H, N, M]."""

    def words(self, row: int, head: int, begin: int, end: int) -> Tensor | None:
        """Bits of the tiles of 64 x 64 tokens, query blocks begin .. end - 1: int64 [P, Q, 64].

        Bit c of word [p, q, r]: query r of the query block sees key c of the key block; blocks are
        counted from position 0. None: the method only knows single tokens.
        """
        return None


@dataclass(frozen=True)
class Tokens(Chosen):
    """Single tokens: bool [B, H, N, M]."""

    seen: Tensor

    def mask(self) -> Tensor:
        """See `Chosen`."""
        return self.seen


class Method(nn.Module, ABC):
    """Chooses keys for a class of heads.

    Attributes:
        block: tokens of a block that is summarised in a cache; 0: nothing is.
        pairwise: whether choosing forms a number for every query and key, so that of many queries
            some are served at a time.
        recalls: whether summaries need the queries of their blocks; the cache then holds those of
            the last tokens.
    """

    block: int = 0
    pairwise: bool = False
    recalls: bool = False

    @abstractmethod
    def choose(self, asked: Asked) -> Chosen:
        """What the queries select. Called without gradients."""

    def remembered(self, rows: Tensor) -> Notes | None:
        """Where these rows of the batch are noted if the call has no cache."""
        return None

    def summary(self, k_BGQcd: Tensor) -> Tensor:
        """[B, G, Q, w] of Q whole blocks of c keys each, for caches."""
        raise NotImplementedError

    def summarise(self, whole: Whole) -> Tensor:
        """[B, G, Q, w]: `summary`, or of more than keys."""
        return self.summary(whole.k_BGQcd)


class Learner(Method):
    """A method with weights that `finder: gate` trains (`reattend.passes.rewrite.sparse_teach`).

    They are frozen in the model: what is chosen passes no gradient on, copies of them are trained.
    """

    @abstractmethod
    def start(self) -> None:
        """Weights before training, always the same."""


def off_grid(kind: str, tokens: int, given: int) -> ArgumentError:
    """The error of a block that chooses over a grid, for another number of tokens."""
    return ArgumentError(
        f"a block with a grid of {tokens} tokens was given {given}",
        where=f"select: {kind}",
        why="it was converted for images of one size",
        next_step="pass images of that size, or convert with another image_grid, "
        "text_before or text_after",
    )


def reach(core: CoreConfig, i: Tensor, block: int, blocks: int, m: int) -> Tensor:
    """Whether queries at positions i [R, 1] may see any key of each block, bool [R, Q]."""
    begin = torch.arange(blocks, device=i.device)[None] * block
    last = (begin + block - 1).clamp(max=m - 1)
    if not core.causal:
        return torch.ones(len(i), blocks, dtype=torch.bool, device=i.device)
    # of the keys of a block that are not later than the query, the nearest is the likeliest
    return (begin <= i) & own_pattern(core, i, torch.minimum(last, i))
