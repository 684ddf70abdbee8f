"""What `examples/near_far.py` asks is what its pixels show; the pairs read are counted right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, dense
from test_selecting import BOTH_WAYS, converted
from torch.nn.functional import conv2d

from reattend.mixers.base import Context

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
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


@pytest.mark.parametrize("name", ["picture", "video"])
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
    for inside in (apart <= 4, (apart > 4) & (apart <= 8), apart > 8):
        assert inside.float().mean() > 0.1


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
