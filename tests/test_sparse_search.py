"""Heads are chosen by what the model loses without them, on text that repeats itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import config, dense
from pydantic import ValidationError

from reattend import convert
from reattend.errors import PlanError
from reattend.mixers.base import Mixer
from reattend.mixers.sparse import SparseAttention
from reattend.passes.rewrite.base import Subject
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions


def options(keep: float, **more: Any) -> SparseOptions:
    return SparseOptions(pattern={"sinks": 1, "window": 4}, keep_full=keep, **more)


def test_the_heads_that_move_the_output_most_stay() -> None:
    """A measure that knows: head 1 of the first site and head 0 of the second are needed."""
    needed = {("a", 1): 9.0, ("b", 0): 5.0, ("a", 0): 1.0, ("b", 1): 2.0}
    asked: list[tuple[str, int]] = []

    def measure(path: str, mixer: Mixer) -> float:
        assert isinstance(mixer, SparseAttention)
        head = next(c.kv_heads[0] for c in mixer.config.classes if not c.pattern.full)
        asked.append((path, head))
        return needed[path, head]

    sites: list[Any] = [Subject(p, dense(config()), None, options(0.5)) for p in ("a", "b")]
    chosen = ToSparse().allocate(sites, measure)
    assert sorted(asked) == sorted(needed)
    assert [o.heads_full for o in chosen] == [(1,), (0,)]
    assert all(o.keep_full is None for o in chosen)


def test_a_pattern_that_hides_nothing_cannot_choose() -> None:
    sites: list[Any] = [Subject("a", dense(config()), None, options(0.5))]
    with pytest.raises(PlanError, match=r"raise calibrate\.seq_len"):
        ToSparse().allocate(sites, lambda path, mixer: 0.0)
    with pytest.raises(PlanError, match="heads_full"):
        ToSparse().allocate(sites, lambda path, mixer: None)


def test_candidates_share_one_budget() -> None:
    """Wide windows go where they save most; the sum of what is read keeps to the budget."""
    narrow, wide = ({"window": w} for w in (8, 32))
    loss = {("a", 0): (9.0, 1.0), ("a", 1): (0.2, 0.1), ("b", 0): (3.0, 2.5), ("b", 1): (8.0, 0.5)}

    def measure(path: str, mixer: Mixer) -> float:
        assert isinstance(mixer, SparseAttention)
        (one,) = [c for c in mixer.config.classes if not c.pattern.full]
        return loss[path, one.kv_heads[0]][one.pattern.window == 32]

    given = SparseOptions(candidates=(narrow, wide), kv_density=20 / 64, density_at=64)
    sites: list[Any] = [Subject(p, dense(config()), None, given) for p in ("a", "b")]
    chosen = ToSparse().allocate(sites, measure)
    windows = [[c.pattern.window for c in o.head_patterns] for o in chosen]
    assert windows == [[32, 8], [8, 32]]
    small = given.model_copy(update={"kv_density": 0.1})
    with pytest.raises(PlanError, match="no candidate is small enough"):
        ToSparse().allocate([Subject("a", dense(config()), None, small)], measure)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"candidates": [{"window": 4}]}, "go together"),
        ({"kv_density": 0.5}, "go together"),
        ({"keep_full": 0.5}, "needs a `pattern`"),
        ({"keep_full": 0.5, "pattern": {"window": 4}, "heads_full": [0]}, "name no heads"),
        (
            {"candidates": [{"window": 4}], "kv_density": 0.5, "pattern": {"window": 4}},
            "no pattern beside",
        ),
        (
            {"heads_full": [0], "head_patterns": [{"kv_heads": [0], "pattern": {"window": 1}}]},
            "at most once",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SparseOptions(**given)


@pytest.mark.parametrize("keep", [0.25, 1.0])
def test_a_model_keeps_the_share_it_is_given(keep: float) -> None:
    rule = {"sites": "*", "to": "sparse", "pattern": {"sinks": 1, "window": 4}, "keep_full": keep}
    plan = {"rules": [rule], "calibrate": {"seq_len": 24, "statistics_tokens": 240}}
    data = torch.randint(3, 97, (12, 24))
    result = convert(decoder("llama", layers=2, groups=2), plan=plan, data=data)
    classes = [layer.self_attn.mixer.config.classes for layer in result.model.model.layers]
    full = sum(len(c.kv_heads) for layer in classes for c in layer if c.pattern.full)
    assert full == round(keep * 4)
    assert all("heads_full" in site.options for site in result.report.sites)
