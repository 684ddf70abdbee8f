"""Masks of many kinds for the tests of sparse attention, written as predicates."""

from __future__ import annotations

import torch
from torch import Tensor


def _pairs(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None]


def _sinks_and_window(n: int, sinks: int, window: int) -> Tensor:
    i, j = _pairs(n)
    return (j <= i) & ((i - j < window) | (j < sinks))


def _random(n: int, share: float) -> Tensor:
    """Pairs at random, some queries blind, and a block whole and one empty among them."""
    gen = torch.Generator().manual_seed(n)
    mask = torch.rand(n, n, generator=gen) < share
    mask[:: max(n // 3, 1)] = False
    mask[16:32, 16:32] = True
    mask[32:48, :16] = False
    return mask


def _vision(n: int, radius: int) -> Tensor:
    """A circle over a grid 8 wide that looks both ways, after 5 text tokens seen by all."""
    i, j = _pairs(n)
    row_i, col_i, row_j, col_j = (i - 5) // 8, (i - 5) % 8, (j - 5) // 8, (j - 5) % 8
    near = (row_i - row_j) ** 2 + (col_i - col_j) ** 2 <= radius**2
    return (i < 5) | (j < 5) | near


def _strided(n: int, stride: int) -> Tensor:
    i, j = _pairs(n)
    return (j <= i) & ((i - j < 5) | (j % stride == 0))


def _cell(n: int, block: int) -> Tensor:
    i, j = _pairs(n)
    return (i // block + j // block) % 2 == 0


def mask_of(pattern: str, n: int) -> Tensor:
    """Three different masks of a kind, bool (3, n, n)."""
    i, j = _pairs(n)
    kinds = {
        "causal": lambda a: (j <= i) & (i - j < n * a),
        "full": lambda a: torch.ones(n, n, dtype=torch.bool),
        "nothing": lambda a: (j <= i) & (i >= 20 * a) & (i < 50),
        "sinks-and-window": lambda a: _sinks_and_window(n, 2 * a, 5 + 9 * a),
        "strided": lambda a: _strided(n, 2 + a),
        "random": lambda a: _random(n, 0.1 + 0.2 * a),
        "vision": lambda a: _vision(n, 1 + a),
        "whole-blocks": lambda a: _cell(n, 16 * a),
    }
    return torch.stack([kinds[pattern](a) for a in (1, 2, 3)])


PATTERNS = (
    "causal",
    "full",
    "nothing",
    "sinks-and-window",
    "strided",
    "random",
    "vision",
    "whole-blocks",
)
