"""Pictures and videos whose answers need near and far tokens, and an encoder that learns them.

Two keys lie in every sample, one red and one blue, each of one of four kinds. Everything else is
red or blue too, and every token on it is asked two questions. *near*, told by the tokens around it:
which of four shapes (a picture), how it moves (a video). *far*: of what kind is the key of
its colour, which lies anywhere in the picture, or in any frame of the video. There is no class
token. Layout letters: B batch, T frames, K things, C colours, N tokens, D width.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, interpolate, scaled_dot_product_attention

PATCH, KINDS, LAYERS, HEADS, WIDTH = 4, 4, 3, 4, 64
BATCH, MATRICES, REST = 16, 0.02, 3e-3
NONE = -100  # nothing is asked of this token

#: 8 x 8 points, kinds of things and kinds of keys
GLYPHS = (
    "ff/ff/c3/c3/c3/c3/ff/ff", "18/18/18/ff/ff/18/18/18", "c3/e7/7e/3c/3c/7e/e7/c3",
    "ff/ff/00/00/00/00/ff/ff", "ff/7f/3f/1f/0f/07/03/01", "f0/f0/f0/f0/0f/0f/0f/0f",
    "aa/55/aa/55/aa/55/aa/55", "18/3c/7e/ff/ff/7e/3c/18",
)  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """Pixels (B, 3, T, height, width); answers (B, N, 2), near and far; how far the key is."""

    pixels: Tensor
    answers_BN2: Tensor
    distance_BN: Tensor

    @property
    def asked(self) -> Tensor:
        """The tokens that are asked, bool (B, N)."""
        return self.answers_BN2[..., 0] != NONE


class Pictures:
    """Two keys and six things on 64 x 64 points; distance in tokens, the larger of both axes."""

    name, grid, steps, start = "picture", (16, 16), 900, ""

    def draw(self, rows: int, generator: torch.Generator) -> Samples:
        """So many pictures."""
        many, cells = 8, torch.rand(rows, 16, generator=generator).argsort(1)[:, :8]
        corner_BK2 = torch.stack([cells // 4, cells % 4], -1) * 16
        corner_BK2 = corner_BK2 + _below(9, (rows, many, 2), generator)
        colour_BK = _below(2, (rows, many), generator)
        colour_BK[:, 0], colour_BK[:, 1] = 0, 1
        kind_BK = _below(KINDS, (rows, many), generator)
        shown_BK = kind_BK + KINDS * (torch.arange(many) < 2)
        pixels = 0.2 * torch.randn(rows, 3, 64, 64, generator=generator)
        y, x = (corner_BK2[..., n, None] + torch.arange(8) for n in (0, 1))
        at = (torch.arange(rows)[:, None, None, None], y[..., None], x[..., None, :])
        drawn = 1.5 * _glyphs()[shown_BK]
        pixels.index_put_((at[0], 2 * colour_BK[..., None, None], *at[1:]), drawn, True)
        green = drawn * (torch.arange(many) < 2)[:, None, None]
        pixels.index_put_((at[0], torch.ones_like(at[1]), *at[1:]), green, True)
        first = torch.arange(16) * PATCH
        shared = (corner_BK2[..., None] + 8).clamp_max(first + PATCH) - corner_BK2[..., None].clamp(
            min=first
        )
        on_BK2S = shared >= PATCH - 1
        answers = torch.full((rows, 16, 16, 2), NONE)
        distance = torch.zeros(rows, 16, 16)
        for k in range(2, many):
            key_B = colour_BK[:, k]
            here = on_BK2S[:, k, 0, :, None] & on_BK2S[:, k, 1, None, :]
            told = torch.stack([kind_BK[:, k], kind_BK.gather(1, key_B[:, None])[:, 0]], -1)
            answers = torch.where(here[..., None], told[:, None, None], answers)
            apart = corner_BK2[:, k] - corner_BK2[torch.arange(rows), key_B]
            far_B = apart.abs().amax(-1) / PATCH
            distance = torch.where(here, far_B[:, None, None], distance)
        return Samples(pixels[:, :, None], answers.flatten(1, 2), distance.flatten(1))


@dataclass(frozen=True)
class Videos:
    """Two balls that move, two keys that each flash in one frame; distance in frames.

    Attributes:
        name: of the field.
        grid: frames, and tokens along both axes of a frame.
        steps: of the training.
        ways: how a ball may move from frame to frame, in points down and across.
        start: the field whose encoder this one's starts as, its places drawn out or together.
    """

    name: str
    grid: tuple[int, int, int]
    steps: int
    ways: tuple[tuple[int, int], ...] = ((0, 1), (0, -1), (1, 0), (-1, 0))
    start: str = ""

    def draw(self, rows: int, generator: torch.Generator) -> Samples:
        """So many videos of square frames, whose edges are joined."""
        (frames, wide, _), side = self.grid, self.grid[1] * PATCH
        time_T = torch.arange(frames)
        way_BC = _below(4, (rows, 2), generator)
        step_BC2 = torch.tensor(self.ways)[way_BC]
        start_BC2 = _below(side, (rows, 2, 2), generator)
        kind_BC = _below(KINDS, (rows, 2), generator)
        flash_BC = _below(frames, (rows, 2), generator)
        flash_BC[:, 1] = (flash_BC[:, 0] + 1 + _below(frames - 1, (rows,), generator)) % frames
        corner_BC2 = _below(side - 7, (rows, 2, 2), generator)
        pixels = 0.2 * torch.randn(rows, 3, frames, side, side, generator=generator)
        answers = torch.full((rows, *self.grid, 2), NONE)
        distance = torch.zeros(rows, *self.grid)
        b, t = torch.arange(rows)[:, None, None, None], time_T[:, None, None]
        for c in range(2):
            at_BT2 = (start_BC2[:, c, None] + time_T[:, None] * step_BC2[:, c, None]) % side
            y, x = ((at_BT2[..., n, None] + torch.arange(4)) % side for n in (0, 1))
            ball = torch.tensor(1.5)
            pixels.index_put_(
                (b, torch.tensor(2 * c), t, y[..., None], x[..., None, :]), ball, True
            )
            y, x = (corner_BC2[:, c, n, None] + torch.arange(8) for n in (0, 1))
            glyph = 1.5 * _glyphs()[KINDS + kind_BC[:, c]]
            place = (flash_BC[:, c, None, None], y[:, :, None], x[:, None])
            for channel in (2 * c, 1):
                pixels.index_put_((b[..., 0], torch.tensor(channel), *place), glyph, True)
            middle = (at_BT2 + 2) % side // PATCH
            down, across = (middle[..., n, None] == torch.arange(wide) for n in (0, 1))
            here = down[..., None] & across[..., None, :]
            told = torch.stack([way_BC[:, c], kind_BC[:, c]], -1)[:, None, None, None]
            twice = here & (answers[..., 0] != NONE)  # both balls: neither is asked
            answers = torch.where(here[..., None], told, answers)
            answers = torch.where(twice[..., None], NONE, answers)
            far_BT = (flash_BC[:, c, None] - time_T).abs().float()
            distance = torch.where(here, far_BT[..., None, None], distance)
        return Samples(pixels, answers.flatten(1, 3), distance.flatten(1))


FIELDS: dict[str, Any] = {
    field.name: field
    for field in (
        Pictures(),
        Videos("video", (16, 4, 4), 700),
        Videos("long video", (48, 3, 3), 700, ((0, 0), (0, 1), (1, 0), (1, 1)), "video"),
    )
}


def _below(end: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(end, shape, generator=generator)


def _glyphs() -> Tensor:
    rows = [[int(row, 16) for row in glyph.split("/")] for glyph in GLYPHS]
    return (torch.tensor(rows)[..., None] >> torch.arange(7, -1, -1) & 1).float()


class Block(nn.Module):
    """Attention of all tokens to all, and a layer of neurons, both behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x_BND: Tensor) -> Tensor:
        """The same shape."""
        b, n, _ = x_BND.shape
        normed = self.norm(x_BND)
        q, k, v = (
            linear(normed).view(b, n, HEADS, WIDTH // HEADS).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q, k = self.turned(q), self.turned(k)
        seen = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH)
        x_BND = x_BND + self.o(seen)
        more: Tensor = self.down(gelu(self.up(self.second_norm(x_BND))))
        return x_BND + more

    def turned(self, x_BHNd: Tensor) -> Tensor:
        """Queries or keys by their places: here as they are."""
        return x_BHNd


class Encoder(nn.Module):
    """A vision transformer that answers for every token: (B, N, 2, KINDS) logits, near and far."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.places = nn.Parameter(0.02 * torch.randn(tokens, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * KINDS)

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class; pixels (B, 3, T, height, width)."""
        x_BND = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        for layer in self.layers:
            x_BND = layer(x_BND)
        answers: Tensor = self.head(self.norm(x_BND)).unflatten(-1, (2, KINDS))
        return answers


def loss_of(model: nn.Module, samples: Samples) -> Tensor:
    """Nats per question."""
    asked = samples.asked
    return cross_entropy(
        model(samples.pixels)[asked].flatten(0, 1), samples.answers_BN2[asked].flatten()
    )


def trained(field: Any, seed: int, folder: Path) -> tuple[Encoder, float]:
    """The encoder of a field and the seconds of its training, which the folder keeps."""
    torch.manual_seed(seed)
    model = Encoder(math.prod(field.grid))
    if field.start and not _file(field, seed, folder).exists():
        start(model, field, trained(FIELDS[field.start], seed, folder)[0])
    return kept(model, loss_of, field, seed, folder)


def _file(field: Any, seed: int, folder: Path) -> Path:
    return folder / f"{field.name.replace(' ', '-')}-{seed}.safetensors"


def kept(model: Any, loss: Any, field: Any, seed: int, folder: Path) -> tuple[Any, float]:
    """A model, trained where the folder does not have it, and the seconds that took.

    Args:
        model: untrained.
        loss: (model, samples) -> nats.
        field: what draws the samples, and names the file.
        seed, folder: of the training; where weights are kept.
    """
    file = _file(field, seed, folder)
    if not file.exists():
        seconds = train(model, loss, field, seed)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file, {"seconds": f"{seconds:.0f}"})
    model.load_state_dict(load_file(file))
    with safe_open(file, "pt") as opened:
        return model.eval(), float(opened.metadata()["seconds"])


def start(model: Encoder, field: Any, other: Encoder) -> None:
    """Give an encoder the weights of another one, whose places it resizes to the field's grid."""
    weights = other.state_dict()
    places = weights["places"].T.unflatten(1, FIELDS[field.start].grid)
    resized = interpolate(places[None], field.grid, mode="trilinear")[0]
    model.load_state_dict({**weights, "places": resized.flatten(1).T})


def train(model: nn.Module, loss_of: Any, field: Any, seed: int) -> float:
    """Every step another batch; the seconds it took."""
    generator, begin = torch.Generator().manual_seed(seed + 1), time.perf_counter()
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("layers")]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(inner, lr=MATRICES, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=REST, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: min(1.0, (step + 1) / 20, (field.steps - step) / (0.5 * field.steps))
        )
        for o in optimizers
    ]
    for step in range(field.steps):
        loss = loss_of(model, field.draw(BATCH, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        if step % 50 == 49:
            now = f"{float(loss.detach()):.3f}  {time.perf_counter() - begin:.0f} s"
            print(f"step {step + 1}/{field.steps}  loss {now}", file=sys.stderr, flush=True)
    return time.perf_counter() - begin
