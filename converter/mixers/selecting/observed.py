"""SparseD: a map of blocks, seen in one pass over a text and read in the passes that follow.

Wang et al., arXiv 2509.24014. What differs: where the paper's code keeps int(share x blocks) + 1 of
all blocks of a row, and drops those of the other part, here each part keeps its share, rounded up.

Layout letters: as in `base`; P query blocks, Q key blocks, c tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.mixers.selecting.base import Asked, Chosen, Method, Tokens
from reattend.mixers.selecting.blocks import Routes
from reattend.mixers.selecting.budget import within
from reattend.patterns.routing import Observed


@dataclass
class Seen:
    """What some rows of the batch have seen. See `Notes`.

    Attributes:
        passes: how many.
        tokens: of each row.
        map_BHPQ: which blocks are read from now on.
    """

    passes: int = 0
    tokens: int = 0
    map_BHPQ: Tensor | None = None

    def write(self, found: Tensor) -> None:
        """Keep a map."""
        self.map_BHPQ = found

    def read(self) -> Tensor | None:
        """The map, once there is one."""
        return self.map_BHPQ


@dataclass
class Text:
    """One text, or batch, that is filled in by so many passes.

    Attributes:
        passes: of the whole text.
        new_tokens: at its end, that are filled in.
        seen: by rows of the batch.
    """

    passes: int
    new_tokens: int
    seen: dict[tuple[int, ...], Seen] = field(default_factory=dict)

    def of(self, rows: tuple[int, ...]) -> Seen:
        """What these rows have seen; they stay together from pass to pass.

        Raises:
            ArgumentError: they were together with others before.
        """
        if rows not in self.seen:
            if any(set(rows) & set(known) for known in self.seen):
                raise _changed()
            self.seen[rows] = Seen()
        return self.seen[rows]


def _changed() -> ArgumentError:
    return ArgumentError(
        "a text that is filled in changed its length or its rows",
        where="select: observed",
        why="later passes read the blocks that an earlier pass over the text found",
        next_step="begin another `with denoising(...)` for another text",
    )


class ObservedMethod(Method):
    """See `Observed`; `text` is that of `reattend.denoising`."""

    text: Text | None = None

    def __init__(self, selector: Observed) -> None:
        super().__init__()
        self.selector = selector

    def remembered(self, rows: Tensor) -> Seen | None:
        """What these rows have seen of the text."""
        return None if self.text is None else self.text.of(tuple(rows.tolist()))

    def choose(self, asked: Asked) -> Chosen:
        """Every key, or the map.

        Raises:
            ArgumentError: the text changed its length.
        """
        blocks = -(-asked.k_BGMd.shape[2] // self.selector.block)
        notes, text = asked.notes, self.text
        if text is None or not isinstance(notes, Seen):
            return self._routes(self.observed(asked, blocks), asked)
        first = int(text.passes * self.selector.skip) + 1
        notes.passes += 1
        if notes.passes > 1 and notes.tokens != asked.k_BGMd.shape[2]:
            raise _changed()
        notes.tokens = asked.k_BGMd.shape[2]
        if notes.passes <= first + 1:
            if notes.passes == first + 1:
                prompt = -(-(asked.k_BGMd.shape[2] - text.new_tokens) // self.selector.block)
                notes.write(self.observed(asked, max(0, min(prompt, blocks - 1))))
            shape = (*asked.q_BHNd.shape[:3], asked.k_BGMd.shape[2])
            return Tokens(torch.ones(shape, dtype=torch.bool, device=asked.q_BHNd.device))
        found = notes.read()
        assert found is not None
        return self._routes(found, asked)

    def _routes(self, map_BHPQ: Tensor, asked: Asked) -> Routes:
        block, m = self.selector.block, asked.k_BGMd.shape[2]
        region_M = torch.arange(m, device=asked.k_BGMd.device) // block
        return Routes(map_BHPQ, region_M, region_M, 0, block if block % 64 == 0 else 0)

    def observed(self, asked: Asked, prompt: int) -> Tensor:
        """The best blocks of each row among the first `prompt` ones, and among the others."""
        block, m = self.selector.block, asked.k_BGMd.shape[2]
        blocks, rows = -(-m // block), []
        for begin in range(0, m, block):
            p = asked.scores(asked.q_BHNd[:, :, begin : begin + block], asked.k_BGMd).softmax(-1)
            sums = torch.nn.functional.pad(p.sum(2), (0, blocks * block - m))
            rows.append(sums.unflatten(-1, (blocks, block)).sum(-1))
        paid = torch.stack(rows, 2)
        every = torch.ones((), dtype=torch.bool, device=paid.device)
        parts = [x for x in (paid[..., :prompt], paid[..., prompt:]) if x.shape[-1]]
        return torch.cat([within(x, every, self.selector) for x in parts], -1)
