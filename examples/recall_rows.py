"""Rows of text in which much comes again, and a first head: for a model that looks things up.

Into text go *items*: spans of tokens that stand at two places of the row. Some are of text, some of
tokens drawn at random, some groups whose spans begin alike, as keys with values do. Only what can
be known is counted in the loss: not a random span when it comes first, not the token that begins
its second time, not the first token by which the spans of a group differ.
"""

from __future__ import annotations

from typing import Any

#: tokens of a span, and of the beginning that the spans of a group share
SPAN, SHARED = (4, 24), 4
#: spans of a group; a row gets an item per so many tokens
GROUP, EVERY = 4, 40
#: random tokens are below this: bytes and the shortest pieces, few enough to be met often
DRAWN = 512
#: share of the tokens of plain text that the loss counts
TEXT = 0.25
#: an item that finds no free place is drawn again so often
TRIES = 8
#: of `look_back`: as much as the embedding's other numbers together; the weights that read it
CONSTANT, SHARPNESS = 0.25, 0.9


class RecallRows:
    """Rows from one long stream of token ids; the same rows for the same seed."""

    def __init__(self, ids: Any, seed: int) -> None:
        import torch

        self.ids = ids
        self.generator = torch.Generator().manual_seed(seed)

    def _below(self, size: int) -> int:
        import torch

        return int(torch.randint(size, (), generator=self.generator))

    def _drawn(self, size: int) -> Any:
        """Random tokens: of the first of the vocabulary, or as often as they occur in text."""
        import torch

        if self._below(2):
            return torch.randint(1, DRAWN, (size,), generator=self.generator)
        return self.ids[torch.randint(len(self.ids), (size,), generator=self.generator)]

    def _places(self, taken: Any, size: int) -> tuple[int, int] | None:
        """Two free places for a span, the first one first; every distance is as likely."""
        length = len(taken)
        for _ in range(TRIES):
            distance = size + self._below(length - 2 * size)
            first = self._below(length - size - distance + 1)
            second = first + distance
            if not (taken[first : first + size].any() or taken[second : second + size].any()):
                taken[first : first + size] = taken[second : second + size] = True
                return first, second
        return None

    def row(self, length: int) -> tuple[Any, Any]:
        """(length,) token ids, and (length,) which of them are counted in the loss."""
        import torch

        start = self._below(len(self.ids) - length)
        row_N = self.ids[start : start + length].clone()
        counted_N = torch.rand(length, generator=self.generator) < TEXT
        taken_N = torch.zeros(length, dtype=torch.bool)
        for _ in range(max(1, length // EVERY)):
            kind, size = self._below(3), SPAN[0] + self._below(SPAN[1] - SPAN[0])
            if kind == 2:
                self._group(row_N, counted_N, taken_N)
                continue
            places = self._places(taken_N, size)
            if places is None:
                continue
            first, second = places
            if kind == 1:
                row_N[first : first + size] = self._drawn(size)
                counted_N[first : first + size] = False
            row_N[second : second + size] = row_N[first : first + size].clone()
            counted_N[second : second + size] = True
            counted_N[second] = False
        return row_N, counted_N

    def _group(self, row_N: Any, counted_N: Any, taken_N: Any) -> None:
        """Spans of random tokens that begin alike."""
        import torch

        size = 2 * SHARED + self._below(SPAN[1] - 2 * SHARED)
        head = self._drawn(SHARED)
        for _ in range(GROUP):
            places = self._places(taken_N, size)
            if places is None:
                return
            first, second = places
            row_N[first : first + size] = torch.cat([head, self._drawn(size - SHARED)])
            row_N[second : second + size] = row_N[first : first + size].clone()
            counted_N[first : first + size] = False
            counted_N[second : second + size] = True
            counted_N[[second, second + SHARED]] = False

    def _copies(self, stage: Any) -> tuple[Any, Any]:
        """Random tokens that begin again, in each row after a number of its own."""
        import torch

        shape, length = (stage.rows, stage.length), stage.length
        ids = torch.randint(1, DRAWN, shape, generator=self.generator)
        place, ends = torch.arange(length).expand(shape), (length // 4, 3 * length // 4)
        period = torch.randint(*ends, (stage.rows, 1), generator=self.generator)
        return ids.gather(1, place % period), place > period

    def batch(self, stage: Any) -> tuple[Any, Any]:
        """(rows, length) token ids and which of them are counted."""
        import torch

        if stage.copies:
            return self._copies(stage)
        made = [self.row(stage.length) for _ in range(stage.rows)]
        return torch.stack([ids for ids, _ in made]), torch.stack([kept for _, kept in made])


def look_back(model: Any) -> None:
    """Let the first head of a Llama begin as one that attends to the token before.

    What copies builds on such a head, and text teaches one only in more tokens than are spent here.
    All embeddings get a constant as their first number; query and key read it with the faster
    rotary pairs, those of the key one token ahead, so that the scores peak at a distance of 1.
    """
    import torch

    attention, width = model.model.layers[0].self_attn, model.config.head_dim
    angle = model.model.rotary_emb.inv_freq
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = CONSTANT
        for weight, turn in (
            (attention.q_proj.weight, torch.zeros_like(angle)),
            (attention.k_proj.weight, angle),
        ):
            weight[:width] = 0.0
            fast = SHARPNESS * (torch.arange(len(turn)) < len(turn) // 2)
            weight[:width, 0] = torch.cat([fast * turn.cos(), fast * turn.sin()])
