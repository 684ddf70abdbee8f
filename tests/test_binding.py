"""Arguments are matched by value, never by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig

from reattend.install.binding import (
    Binding,
    bound,
    leaves,
    match,
    match_output,
    pack,
    read,
)
from reattend.install.caching import watch_cache
from reattend.install.pieces import CacheAt
from reattend.install.tables import match_table, match_tables

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Owner(nn.Module):
    def forward(self, stuff: Tensor, pair: Any = None, flag: bool = False, **more: Any) -> Any:
        return stuff, pair, flag, more


def test_names_do_not_matter() -> None:
    arguments = bound(Owner(), (X,), {"pair": (X + 1, X + 2), "extra": X + 3})
    assert match(arguments, X + 2) == ("pair", 1)
    assert match(arguments, X + 3) == ("extra",)
    assert match(arguments, X + 9) is None
    assert match(arguments, X[:, :4]) is None


def test_the_best_of_several_near_values_wins() -> None:
    arguments = {"a": X * 1.01, "b": X * 1.0001}
    assert match(arguments, X) == ("b",)


def test_integers_must_be_equal_and_masks_keep_their_infinities() -> None:
    ids = torch.arange(5)[None]
    assert match({"a": ids + 1, "b": ids}, ids) == ("b",)
    mask = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -3.4e38)
    assert match({"m": mask}, mask.clone()) == ("m",)
    assert match({"m": mask.transpose(-1, -2)}, mask) is None


def test_reading_follows_paths_and_tolerates_absence() -> None:
    arguments = {"pair": (X, None)}
    assert read(arguments, ("pair", 0)) is X
    assert read(arguments, ("pair", 1)) is None
    assert read(arguments, ("absent", 3)) is None
    assert read(arguments, None) is None
    assert [p for p, _ in leaves({"a": [1, {"b": 2}]})] == [("a", 0), ("a", 1, "b")]


def test_rotary_tables_are_found_in_any_shape() -> None:
    angle = torch.outer(torch.arange(7).double(), torch.tensor([1.0, 0.4, 0.1]).double())
    cos, sin = angle.cos(), angle.sin()
    full = torch.cat([cos, cos], -1)[None].float()
    hit = match_table({"x": X, "e": (full, sin)}, cos)
    assert hit is not None
    assert (hit[0].path, hit[0].columns) == (("e", 0), (0, 1, 2))
    assert abs(hit[1] - 1) < 1e-6
    turned = match_table({"f": torch.polar(torch.ones_like(angle), angle)[None]}, sin)
    assert turned is not None
    assert turned[0].part == "imag"
    interleaved = match_table({"c": cos.repeat_interleave(2, -1)}, cos)
    assert interleaved is not None
    assert interleaved[0].columns == (0, 2, 4)
    scaled = match_table({"c": cos * 1.5}, cos)
    assert scaled is not None
    assert abs(scaled[1] - 1 / 1.5) < 1e-6
    assert match_table({"c": cos.square()}, cos) is None


def test_slow_pairs_are_told_apart_by_their_sines() -> None:
    """Their cosines are one at 23 positions and not at 4,096: no column may be another pair's."""
    angle = torch.outer(torch.arange(23).double(), 1e4 ** -(torch.arange(64).double() / 64))
    cos, sin = angle.cos(), angle.sin()
    twice = {"pair": tuple(t.repeat_interleave(2, -1)[None].float() for t in (cos, sin))}
    hits = match_tables(twice, cos, sin)
    assert [h and h[0].columns for h in hits] == [tuple(range(0, 128, 2))] * 2
    beside = {"both": torch.cat([cos, sin], -1)[None].float()}
    of_cos, of_sin = match_tables(beside, cos, sin)
    assert of_cos is not None and of_cos[0].columns == tuple(range(64))
    assert of_sin is not None and of_sin[0].columns == tuple(range(64, 128))


def test_results_keep_their_shape_and_aliases() -> None:
    arguments = {"hidden": X, "cache": object()}
    y = X * 2
    shape = match_output((y, None, arguments["cache"], torch.rand(3)), y, arguments)
    assert shape == {"tuple": ["y", None, {"path": ["cache"]}, None]}
    built = pack(shape, X, arguments)
    assert built[0] is X
    assert built[2] is arguments["cache"]
    assert match_output((X, X), y, arguments) is None
    assert match_output([y, y], y, arguments) is None


def test_a_binding_survives_json() -> None:
    binding = Binding(hidden=("hidden_states",), mask=("m", 0), output={"tuple": ["y", None]})
    assert Binding.model_validate(binding.model_dump(mode="json")) == binding


class Writes(nn.Module):
    """A module that is called several times and writes to another layer each time."""

    def __init__(self, *shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, cache: Any, number: int, step: int) -> None:
        cache.update(X[:, None], X[:, None], self.shift[step] + number)


class Several(nn.Module):
    config = LlamaConfig(num_hidden_layers=8)

    def __init__(self, *shift: int) -> None:
        super().__init__()
        self.inner = Writes(*shift)

    def forward(self, past_key_values: Any, use_cache: bool) -> None:
        for step, number in enumerate((0, 2, 4)):
            self.inner(past_key_values, number, step)


@pytest.mark.parametrize(
    ("shift", "place"),
    [
        ((1, 1, 1), CacheAt(("cache",), None, 1, ("number",))),
        ((4, 2, 0), CacheAt(("cache",), None, 4)),
        ((2, 1, 3), CacheAt(("cache",), None, 2, ())),
    ],
)
def test_layers_of_a_cache_are_counted_from_an_argument(
    shift: tuple[int, ...], place: CacheAt
) -> None:
    assert watch_cache(Several(*shift), {"inner"}, {}) == {"inner": place}


class OwnCache(DynamicCache):
    """As some hybrids have one."""


class Particular(Several):
    def forward(self, use_cache: bool, past_key_values: Any = None) -> None:
        if past_key_values is not None and type(past_key_values) is not OwnCache:
            raise ValueError("only its own cache")
        super().forward(past_key_values or OwnCache(), use_cache)


def test_a_cache_that_the_model_makes_itself_is_watched_too() -> None:
    place = CacheAt(("cache",), None, 1, ("number",))
    before = Cache.update
    assert watch_cache(Particular(1, 1, 1), {"inner"}, {}) == {"inner": place}
    assert Cache.update is before
