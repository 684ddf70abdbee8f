"""Text with blanks that near and far tokens tell, and a masked diffusion model that fills them in.

A token is a character of Python source, or of a *record*: a key and its value, two tokens that no
text has. Every row is a prompt, with records of 16 keys, and a form, where 12 of the keys come
again. *near*: a character is told by the characters around it. *far*: a value of the form is told
by the record in the prompt, 2 to 254 tokens away. The model sees all tokens and learns to tell
masked ones, at any share of them (as LLaDA, Nie et al., arXiv 2502.09992), to fill in a form in
several passes; keys, and values of the prompt, are given. Layout letters: B batch, N tokens,
V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from near_far import HEADS, LAYERS, WIDTH, Block, kept
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PROMPT, FORM = 192, 64
TOKENS = PROMPT + FORM
CHARACTERS, KEYS, VALUES = 97, 32, 16
MASK = CHARACTERS + KEYS + VALUES
#: records of the prompt, and of the form
RECORDS = (16, 12)
LEAST = 0.05  # of what may be masked is masked when training, at least
VALUED = 8.0  # a value counts in the loss as much as so many characters
SHARPNESS = 4.0  # of the first head


@dataclass(frozen=True)
class Samples:
    """Rows of tokens, which of them are blank, how many are, how far the record of a value is.

    The distance is 0 for every token that is not a value of the form.
    """

    ids_BN: Tensor
    blank_BN: Tensor
    share_B: Tensor
    distance_BN: Tensor

    @property
    def shown(self) -> Tensor:
        """What the model is given, (B, N)."""
        return self.ids_BN.masked_fill(self.blank_BN, MASK)

    def part(self, rows: slice) -> Samples:
        """Some of the rows."""
        return Samples(*(x[rows] for x in vars(self).values()))


class Texts:
    """Rows of a text."""

    name, steps = "text", 2000

    def __init__(self, file: Path) -> None:
        codes = torch.tensor(list(file.read_bytes()))
        printed = (codes >= 32) & (codes < 127)
        self.ids = torch.where(printed, codes - 30, (codes == 10).long())

    def draw(self, rows: int, generator: torch.Generator) -> Samples:
        """So many rows, each with any share of its characters and of the form's values masked."""
        ids_BN, distance_BN = self._written(rows, generator)
        first = torch.rand((), generator=generator)
        share_B = LEAST + (1 - LEAST) * ((first + torch.arange(rows) / rows) % 1)
        blank_BN = torch.rand(ids_BN.shape, generator=generator) < share_B[:, None]
        blank_BN &= (ids_BN < CHARACTERS) | (distance_BN > 0)
        return Samples(ids_BN, blank_BN, share_B, distance_BN)

    def forms(self, rows: int, generator: torch.Generator) -> Samples:
        """So many rows to fill in: of the form every value and half of the characters are blank."""
        ids_BN, distance_BN = self._written(rows, generator)
        half = (torch.rand(ids_BN.shape, generator=generator) < 0.5) & (ids_BN < CHARACTERS)
        half[:, :PROMPT] = False
        blank_BN = half | (distance_BN > 0)
        return Samples(ids_BN, blank_BN, blank_BN.float().mean(1), distance_BN)

    def _written(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Text with records in it, and the distances."""
        start = torch.randint(len(self.ids) - TOKENS, (rows,), generator=generator)
        ids_BN = self.ids[start[:, None] + torch.arange(TOKENS)].clone()
        distance_BN = torch.zeros_like(ids_BN)
        many, asked = RECORDS
        key = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :many]
        value = torch.randint(VALUES, (rows, many), generator=generator)
        at = torch.rand(rows, PROMPT // 2, generator=generator).argsort(1)[:, :many] * 2
        again = torch.rand(rows, FORM // 2, generator=generator).argsort(1)[:, :asked] * 2 + PROMPT
        for place, n in ((at, many), (again, asked)):
            ids_BN.scatter_(1, place, CHARACTERS + key[:, :n])
            ids_BN.scatter_(1, place + 1, CHARACTERS + KEYS + value[:, :n])
        distance_BN.scatter_(1, again + 1, again - at[:, :asked])
        return ids_BN, distance_BN


def speeds(pairs: int) -> Tensor:
    """Radians per token of the pairs of a head."""
    return 1000.0 ** (-torch.arange(pairs) / pairs)


class Turned(Block):
    """A block that turns queries and keys by their places (RoPE)."""

    def turned(self, x_BHNd: Tensor) -> Tensor:
        """The halves of a head are the parts of complex numbers."""
        half = x_BHNd.shape[-1] // 2
        angle = torch.arange(x_BHNd.shape[2], device=x_BHNd.device)[:, None] * speeds(half)
        a, b = x_BHNd[..., :half], x_BHNd[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Denoiser(nn.Module):
    """A bidirectional transformer that tells masked tokens: (B, N, V) logits.

    Its first head begins as one that looks at the token before: a value then knows its key, and
    looking up forms within some hundred steps, where without it 500 steps taught none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(MASK + 1, WIDTH)
        self.layers = nn.ModuleList(Turned() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, MASK)
        nn.init.normal_(self.embed.weight, std=0.5)
        self._look_back()

    def forward(self, ids: Tensor) -> Tensor:
        """See the class; ids (B, N)."""
        x_BND = self.embed(ids)
        for layer in self.layers:
            x_BND = layer(x_BND)
        logits_BNV: Tensor = self.head(self.norm(x_BND))
        return logits_BNV

    def _look_back(self) -> None:
        """Biases alone: the faster pairs of the keys stand one token ahead of the queries'."""
        first: Any = self.layers[0]
        width = WIDTH // HEADS
        turn = speeds(width // 2)
        fast = SHARPNESS * (torch.arange(width // 2) < width // 4)
        with torch.no_grad():
            for linear, by in ((first.q, torch.zeros_like(turn)), (first.k, turn)):
                linear.weight[:width] = 0.0
                linear.bias[:width] = torch.cat([fast * by.cos(), fast * by.sin()])


def loss_of(model: nn.Module, samples: Samples) -> Tensor:
    """Nats per token, where masked tokens count the more, the fewer there are."""
    blank = samples.blank_BN
    nats = cross_entropy(model(samples.shown)[blank], samples.ids_BN[blank], reduction="none")
    counts_BN = torch.where(samples.distance_BN > 0, VALUED, 1.0)
    weight_BN = counts_BN / samples.share_B[:, None]
    return (nats * weight_BN[blank]).sum() / blank.numel()


def trained(texts: Texts, seed: int, folder: Path) -> tuple[Any, float]:
    """The model, trained where the folder does not have it, and the seconds that took."""
    torch.manual_seed(seed)
    return kept(Denoiser(), loss_of, texts, seed, folder)
