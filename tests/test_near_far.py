"""What `examples/near_far.py` asks is what its pixels show; the pairs read are counted right."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, dense
from test_selecting import BOTH_WAYS, converted
from torch.nn.functional import conv2d

from reattend.mixers.base import Context
from reattend.patterns.pattern import HeadPattern, laid_out

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
image_patterns: Any = __import__("image_patterns")
near_far: Any = __import__("near_far")
read_keys: Any = __import__("read_keys")
sys.path.pop(0)


def keys_shown(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 2) kinds of the red and the blue key, found by where red or blue is green too."""
    both = torch.minimum(pixels[:, [0, 2]], pixels[:, 1:2]) > 0.75
    frames = both.transpose(1, 2).flatten(0, 2)[:, None].float()
    glyphs = near_far._glyphs()[near_far.KINDS :, None]
    fits = conv2d(frames, 2 * glyphs - 1) / glyphs.sum((1, 2, 3))[:, None, None]
    rows, _, times = pixels.shape[:3]
    best = fits.amax((2, 3)).view(rows, times, 2, near_far.KINDS)
    return best.amax(1).argmax(-1)


@pytest.mark.parametrize("name", ["picture", "video", "long video"])
def test_the_far_answer_is_the_key_of_the_token_s_colour(name: str) -> None:
    field = near_far.FIELDS[name]
    made = field.draw(48, torch.Generator().manual_seed(3))
    again = field.draw(48, torch.Generator().manual_seed(3))
    assert torch.equal(made.pixels, again.pixels)
    shown, side = keys_shown(made.pixels), made.pixels.shape[-1] // near_far.PATCH
    patches = made.pixels[:, [0, 2]].unflatten(-1, (side, 4)).unflatten(-3, (side, 4))
    blue = patches.mean((-1, -3)).flatten(2).argmax(1)  # which colour a token is of
    told = shown.gather(1, blue)[made.asked]
    asked = made.answers_BN2[made.asked]
    assert (told == asked[:, 1]).float().mean() > 0.97
    for column in asked.T:
        counts = torch.bincount(column, minlength=near_far.KINDS) / len(column)
        assert float(counts.min()) > 0.1 and float(counts.max()) < 0.45
    apart = made.distance_BN[made.asked]
    first, second = image_patterns.APART[name]
    for inside in (apart <= first, (apart > first) & (apart <= second), apart > second):
        assert inside.float().mean() > 0.1


def test_an_encoder_starts_as_another_one_whose_places_are_resized() -> None:
    field, other = near_far.FIELDS["long video"], near_far.FIELDS["video"]
    first, model = (near_far.Encoder(math.prod(f.grid)) for f in (other, field))
    frames = torch.arange(math.prod(other.grid)) // math.prod(other.grid[1:])
    first.places.data[:] = frames[:, None]
    near_far.start(model, field, first)
    drawn = model.places.detach()[:, 0].view(field.grid)
    assert torch.allclose(drawn, drawn[:, :1, :1].expand(field.grid))
    steps = drawn[:, 0, 0].diff()
    assert torch.allclose(steps[1:-1], torch.full((45,), other.grid[0] / field.grid[0]), atol=1e-4)
    assert torch.equal(model.head.weight, first.head.weight)


@pytest.mark.parametrize("name", list(near_far.FIELDS))
def test_patterns_that_do_not_choose_read_about_a_half_or_a_quarter(name: str) -> None:
    grid = near_far.FIELDS[name].grid
    places, counted = torch.arange(math.prod(grid)), set()
    for preset, patterns in image_patterns.PATTERNS[name].items():
        for share, given in zip(image_patterns.SHARES, patterns, strict=False):
            pattern = HeadPattern.model_validate(laid_out(given, {"shape": grid}))
            if pattern.select is None:
                seen = pattern.sees(places[:, None], places, BOTH_WAYS.core)
                assert 100 * float(seen.float().mean()) == pytest.approx(share, abs=7)
                counted.add(preset)
    assert {"window", "tile"} < counted


def test_pairs_of_blocks_that_see_everything_are_counted() -> None:
    """A window by arithmetic; blocks chosen at run time by running them."""
    n, block = 32, dense(BOTH_WAYS)
    x = torch.randn(2, n, HIDDEN, dtype=torch.float64)
    for pattern, read in (
        ({"window": 3}, (5 * n - 6) / n**2),
        ({"select": {"kind": "blocks", "block": 8, "queries": "pooled", "topk": 4}}, 1.0),
        ({"full": True}, 1.0),
    ):
        mixer = converted(block, **pattern)

        def run(mixer: Any = mixer) -> None:
            mixer(x, Context())

        assert read_keys.shares(mixer, n, run)["attention"] == pytest.approx(read)
    pattern = {"select": {"kind": "blocks", "block": 8, "queries": "pooled", "topk": 1}}
    mixer = converted(block, **pattern)
    found = read_keys.shares(mixer, n, lambda: mixer(x, Context()))["attention"]
    own = 1 / n  # a query sees itself, whatever its block chose
    assert 1 / 4 <= found <= 1 / 4 + own
