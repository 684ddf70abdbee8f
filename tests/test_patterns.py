"""Patterns against their definitions spelled out token by token, and their block answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from reattend.kernels.sparse_attention import BlockLayout
from reattend.mixers.config import CoreConfig
from reattend.patterns.grids import Grid, GridTiles, GridWindow, Radial, Spans
from reattend.patterns.layouts import block_layout
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.terms import (
    Columns,
    Powers,
    Sinks,
    Slashes,
    Stride,
    Term,
    Window,
)

N = 48
TERMS: list[tuple[Term, Callable[[int, int], bool]]] = [
    (Sinks(tokens=5), lambda i, j: j < 5),
    (Window(base=7), lambda i, j: abs(i - j) < 7),
    (Window(base=-2, slope=0.5), lambda i, j: abs(i - j) < max(1, -2 + (i + 1) // 2)),
    (Window(base=3, slope=1.0), lambda i, j: abs(i - j) < 3 + i + 1),
    (Stride(period=3, offset=1, block=4), lambda i, j: (j // 4 + 1) % 3 == 0),
    (Stride(period=1, block=8), lambda i, j: True),
    (Powers(block=4), lambda i, j: abs(i // 4 - j // 4) in (1, 2, 4, 8, 16)),
    (Columns(at=(0, 9, 10, 40)), lambda i, j: j in (0, 9, 10, 40)),
    (Slashes(distances=(0, 3, 17)), lambda i, j: i - j in (0, 3, 17)),
]


def square(n: int = N) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None, :]


def core(pattern: str = "causal", **more: int) -> CoreConfig:
    return CoreConfig(
        heads=2, kv_heads=2, qk_head_dim=8, v_head_dim=8, scale=1.0, pattern=pattern, **more
    )


def name(term: object) -> str:
    return repr(term) if isinstance(term, Term) else ""


@pytest.mark.parametrize(("term", "meant"), TERMS, ids=name)
def test_a_term_sees_what_its_definition_says(
    term: Term, meant: Callable[[int, int], bool]
) -> None:
    expected = torch.tensor([[meant(i, j) for j in range(N)] for i in range(N)])
    assert torch.equal(term.sees(*square()).expand(N, N), expected)


@pytest.mark.parametrize(("term", "meant"), TERMS, ids=name)
def test_a_term_is_keys_for_every_query_or_ranges_that_move_on(
    term: Term, meant: Callable[[int, int], bool]
) -> None:
    i, j = square()
    seen = term.sees(i, j).expand(N, N)
    if term.by_key:
        assert torch.equal(seen, seen[:1].expand(N, N))
        return
    first, last = term.ranges(i[:, 0], N)
    assert torch.equal(
        ((j[None] >= first[:, :, None]) & (j[None] <= last[:, :, None])).any(1), seen
    ), "union"
    assert not bool((first.diff(dim=0) < 0).any() | (last.diff(dim=0) < 0).any())
    if term.repeats is not None:
        step = term.repeats
        assert torch.equal(seen[step:, step:], seen[:-step, :-step])


@pytest.mark.parametrize(("term", "meant"), TERMS, ids=name)
def test_monotone_terms_never_look_back(term: Term, meant: Callable[[int, int], bool]) -> None:
    seen = term.sees(*square()).expand(N, N) & (square()[1] <= square()[0])
    again = seen[1:] & ~seen[:-1] & (square(N)[1] < square(N)[0][1:])
    if term.monotone:
        assert not bool(again.any())
    else:
        assert bool(again.any()), "a term that never looks back may say so"


GRIDS: list[tuple[Grid, Callable[[list[int], list[int]], bool]]] = [
    (
        GridWindow(shape=(4, 6), text_before=3, radius=1),
        lambda a, b: all(abs(x - y) <= 1 for x, y in zip(a, b, strict=True)),
    ),
    (
        GridWindow(shape=(5, 6), radius=3, norm="circle"),
        lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) < 9,
    ),
    (
        GridTiles(shape=(4, 6), tile=(2, 3), radius=0, text_before=2),
        lambda a, b: a[0] // 2 == b[0] // 2 and a[1] // 3 == b[1] // 3,
    ),
]


@pytest.mark.parametrize(("grid", "meant"), GRIDS, ids=name)
def test_a_grid_sees_text_and_its_surroundings(
    grid: Grid, meant: Callable[[list[int], list[int]], bool]
) -> None:
    n = grid.text_before + grid.tokens + 2

    def sees(i: int, j: int) -> bool:
        a, b = i - grid.text_before, j - grid.text_before
        if not (0 <= a < grid.tokens and 0 <= b < grid.tokens):
            return True
        width = grid.shape[-1]
        return meant([a // width, a % width], [b // width, b % width])

    expected = torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])
    assert torch.equal(grid.sees(*square(n)), expected)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize(
    "grid",
    [
        *(grid for grid, _ in GRIDS),
        GridWindow(shape=(96, 4), radius=1, text_before=5, text_after=3),
        GridWindow(shape=(3, 5, 8), radius=2, norm="neighborhood"),
        GridTiles(shape=(2, 8, 8), tile=(1, 4, 4), radius=0),
        Radial(shape=(8, 2, 16), block=8, text_before=16),
    ],
    ids=name,
)
def test_blocks_far_apart_in_a_grid_are_not_looked_at(grid: Grid, block: int) -> None:
    n = -(-(grid.text_before + grid.tokens + (grid.text_after or 0)) // block) * block
    start = torch.arange(0, n, block)
    spans = Spans(start[:, None], start[:, None] + block - 1, start[None], start[None] + block - 1)
    some, every = grid.touches(spans)
    tiles = grid.sees(*square(n)).unflatten(0, (-1, block)).unflatten(2, (-1, block))
    assert not bool((tiles.any(3).any(1) & ~some).any())
    assert not bool((every & ~tiles.all(3).all(1)).any())
    if grid.shape == (96, 4) and block == 16:
        assert int(some.sum()) < 0.5 * some.numel()  # and it helps


def test_every_query_of_a_neighborhood_sees_the_same_number() -> None:
    grid = GridWindow(shape=(6, 7), radius=2, norm="neighborhood")
    assert set(grid.sees(*square(42)).sum(-1).tolist()) == {25}


def test_radial_windows_halve_as_frames_part() -> None:
    grid = Radial(shape=(8, 4, 16), block=8)
    seen = grid.sees(*square(512))
    row = seen[7 * 64 + 32]  # a place in the middle of the last frame
    kept = row.unflatten(0, (8, 64)).sum(-1).tolist()
    assert kept[0] == 64  # the first frame is a sink
    assert kept[1:] == sorted(kept[1:])
    assert kept[7] == 64 and kept[5] == 63 and kept[3] == 31


def test_a_pattern_is_the_union_of_its_terms_and_of_the_query_itself() -> None:
    pattern = HeadPattern(sinks=2, columns=(20,))
    i, j = square()
    expected = ((j < 2) | (j == 20) | (i == j)) & (j <= i)
    assert torch.equal(pattern.sees(i, j, core()), expected)
    assert pattern.reads(N, core()) == 4


def test_the_blocks_own_pattern_stays() -> None:
    i, j = square()
    assert torch.equal(HeadPattern(full=True).sees(i, j, core()), j <= i)
    sliding = HeadPattern(sinks=4, window=30).sees(i, j, core("sliding", window=5))
    assert torch.equal(sliding, (j <= i) & (j > i - 5))


def test_padding_is_seen_by_nobody() -> None:
    place = torch.tensor([-1, -1, 0, 1, 2])
    seen = HeadPattern(window=2).sees(place[:, None], place[None], core("full"))
    assert not bool(seen[:2].any()) and not bool(seen[:, :2].any())
    assert bool(seen[2:, 2:].diagonal().all())


def test_strides_of_the_heads_of_a_layer_cover_every_block_once() -> None:
    pattern = HeadPattern(stride={"period": 8, "block": 2})
    i, j = torch.tensor([[63]]), torch.arange(64)[None]
    counts = sum(pattern.for_head(h, 4).terms[0].sees(i, j).long() for h in range(4))
    assert isinstance(counts, Tensor) and int(counts.max()) == 1
    assert {pattern.for_head(h, 8).stride.offset for h in range(8)} == set(range(8))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "needs a term"),
        ({"full": True, "window": 3}, "no other term"),
        ({"window": -3}, "at least one token"),
        ({"sinks": -1}, "greater than or equal"),
        ({"window": 3, "window_slope": 1.5}, "less than or equal"),
        ({"tiles": {"shape": [4, 4], "tile": [3, 2]}}, "does not divide"),
        ({"radial": {"shape": [8, 4, 4], "block": 32}}, "two frames of 16 or more"),
        ({"grid": {"shape": [0, 4], "radius": 1}}, "at least one token"),
        ({"colums": [1]}, "Extra inputs"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        HeadPattern(**given)


PATTERNS = [
    HeadPattern(full=True),
    HeadPattern(sinks=3, window=20),
    HeadPattern(window=4, window_slope=0.3),
    HeadPattern(window=17, stride={"period": 3, "block": 16, "offset": 1}),
    HeadPattern(sinks=1, window=1, powers={"block": 16}),
    HeadPattern(columns=(5, 80), slashes=(33, 64)),
    HeadPattern(grid={"shape": [8, 10], "radius": 2, "text_before": 7}),
]
CORES = [core(), core("full"), core("sliding", window=40), core("chunked", chunk=24)]


@pytest.mark.parametrize("own", CORES, ids=lambda c: c.pattern)
@pytest.mark.parametrize(("n", "start"), [(101, 0), (64, 0), (101, 50)])
def test_layouts_hold_what_the_patterns_see(own: CoreConfig, n: int, start: int) -> None:
    """Against the dense masks, and against the compiler of masks where there is one."""
    block = 16
    layout = block_layout(PATTERNS, [0, 6], own, n, start=start, block=block).validate()
    first = start // block * block
    i, j = torch.arange(first, n)[:, None], torch.arange(n)[None]
    expected = torch.stack([p.sees(i, j, own).expand(n - first, n) for p in PATTERNS])
    assert torch.equal(layout.to_mask(n - first, n), expected)
    whole = -(-n // block) * block
    i, j = torch.arange(first, whole)[:, None], torch.arange(whole)[None]
    mask = torch.stack([p.sees(i, j, own).expand(whole - first, whole) for p in PATTERNS])
    other = BlockLayout.from_mask(mask, torch.tensor([0, 6]), block, first=start // block)
    assert torch.equal(layout.row_ptr, other.row_ptr) and torch.equal(layout.col, other.col)
    assert torch.equal(layout.tile < 0, other.tile < 0)
    assert torch.equal(layout.tiles, other.tiles)
