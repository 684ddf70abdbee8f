"""Patterns that hide nothing, or everything, are refused, with sizes that would fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from decoder_models import decoder
from mla_blocks import config

from reattend import convert
from reattend.errors import RefusedError
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.sizing import alone, hides, sized
from reattend.plan import Plan

BOTH_WAYS = config().core.model_copy(update={"causal": False, "pattern": "full"})
NOTHING: list[tuple[str, dict[str, Any], str]] = [
    ("dma", {}, "pattern.select.topk=512,"),
    ("longheads", {}, "pattern.select.block=128 --set pattern.select.topk=4,"),
    ("s2", {"window": 4096}, "pattern.window=512,"),
    ("minference", {"select": {"kind": "vertical-slash"}}, "pattern.select.columns=256 --set"),
    ("tidal", {"select": {"kind": "recorded", "at": [2], "topk": 4096}}, "pattern.select.topk=512"),
]


@pytest.mark.parametrize(("name", "pattern", "example"), NOTHING, ids=[n for n, *_ in NOTHING])
def test_presets_too_wide_for_a_model_say_what_would_fit(
    name: str, pattern: dict[str, Any], example: str
) -> None:
    """At 2,048 tokens; the settings that are named make a plan that fits."""
    rule = Plan.load(name).rules[0]
    data = rule.options.model_dump(exclude_unset=True) if not pattern else {"pattern": pattern}
    given = SparseOptions.model_validate(data)
    refusal = ToSparse().check_within(config(), given, 2048)
    assert refusal is not None and example in refusal.reason, refusal
    settings = re.findall(r"--set (\S+=\d+)", refusal.reason)
    plan = Plan.load({"rules": [{"sites": "*", "to": "sparse", **data}]}).with_set(settings)
    assert ToSparse().check_within(config(), plan.rules[0].options, 2048) is None


@pytest.mark.parametrize(
    ("pattern", "is_alone"),
    [
        ({"window": 1}, True),
        ({"window": 2}, False),
        ({"slashes": (0, -3)}, True),
        ({"slashes": (3,)}, False),
        ({"columns": (5000,)}, True),
        ({"columns": (50,)}, False),
        ({"window": 1, "select": {"kind": "blocks", "topk": 2}}, False),
    ],
)
def test_a_query_that_sees_only_itself_is_refused(pattern: dict[str, Any], is_alone: bool) -> None:
    refusal = ToSparse().check_within(config(), SparseOptions(pattern=pattern), 2048)
    assert (refusal is not None) == is_alone
    assert refusal is None or "itself and nothing else" in refusal.reason


@pytest.mark.parametrize(
    ("select", "hidden"),
    [
        ({"kind": "blocks", "topk": 10**9}, False),
        ({"kind": "blocks", "block": 10**9, "topk": 3}, False),
        ({"kind": "blocks", "topp": 0.9}, True),
        ({"kind": "gate", "ratio": 1.0}, False),
        ({"kind": "segments", "topk": 8, "local": 2048}, False),
        ({"kind": "segments", "topk": 8}, True),
        ({"kind": "values", "topk": 2047}, True),
        ({"kind": "vertical-slash", "columns": 1500, "slashes": 1500}, True),
        ({"kind": "vertical-slash"}, False),
    ],
)
def test_a_budget_of_everything_hides_nothing(select: dict[str, Any], hidden: bool) -> None:
    pattern, core = HeadPattern.model_validate({"select": select}), config().core
    assert hides(pattern, 2048, core) == hidden
    if not hidden:
        more = {k.removeprefix("select."): v for k, v in sized(pattern, 2048, core).items()}
        assert hides(HeadPattern.model_validate({"select": {**select, **more}}), 2048, core)


@pytest.mark.parametrize(
    ("radius", "norm", "hidden"),
    [
        (7, "neighborhood", False),
        (6, "neighborhood", True),
        (16, "circle", True),
        (13, "box", False),
    ],
)
def test_a_grid_is_judged_by_its_own_tokens(radius: int, norm: str, hidden: bool) -> None:
    grid = {"radius": radius, "norm": norm}
    data = {"pattern": {"grid": grid}, "image_grid": (14, 14), "text_before": 1}
    both = config().model_copy(update={"core": BOTH_WAYS})
    refusal = ToSparse().check(both, SparseOptions.model_validate(data))
    assert (refusal is None) == hidden
    assert refusal is None or "--set pattern.grid.radius=3" in refusal.reason


def test_a_block_that_looks_both_ways_is_counted_over_all_queries() -> None:
    """The last query of a text sees fewer keys than one in its middle, or more."""
    assert (
        HeadPattern(sinks=2, window=9).reads(4096, BOTH_WAYS) == 19
    )  # 8 to either side, 2, itself
    grows = HeadPattern(window=0, window_slope=1.0)
    assert hides(grows, 128, BOTH_WAYS) and not alone(grows, 128, BOTH_WAYS)
    assert grows.reads(128, BOTH_WAYS) == pytest.approx(0.75 * 128, abs=1)


def test_a_selector_over_a_grid_reads_its_share_of_it() -> None:
    """BiFormer's 16 of 49 regions and a class token: 65 of 197 tokens."""
    where = {"shape": (14, 14), "text_before": 1, "text_after": 0}
    select = {"kind": "blocks", "tile": (2, 2), "queries": "pooled", "topk": 16, **where}
    read = HeadPattern.model_validate({"select": select}).reads(4096, BOTH_WAYS)
    assert read == pytest.approx(4096 * 65 / 197, abs=2)


def test_tidal_needs_a_layer_behind() -> None:
    pattern = {"select": {"kind": "recorded", "at": [20], "topk": 64}}
    plan = {"rules": [{"sites": "*", "to": "sparse", "pattern": pattern}]}
    with pytest.raises(
        RefusedError, match=r"no layer lies behind .* --set 'pattern\.select\.at=\[0\]"
    ):
        convert(decoder("llama", layers=2, groups=2), plan=plan)


def test_single_heads_are_judged_too() -> None:
    rule = {"sites": "*", "heads": [0], "to": "sparse", "pattern": {"window": 5000}}
    with pytest.raises(RefusedError, match="hides nothing"):
        convert(decoder("llama", layers=1, groups=2), plan={"rules": [rule]})


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({"powers": {}}, "powers block 64"),
        ({"window": 9, "stride": {"period": 8}}, "window 9, stride period 8 block 64"),
        ({"select": {"kind": "blocks", "topk": 3}}, "select blocks topk 3 block 64 last 1"),
        ({"grid": {"radius": 3, "norm": "circle"}}, "grid radius 3 norm circle"),
        ({"full": True}, "full"),
    ],
)
def test_words_have_the_sizes_that_count(pattern: dict[str, Any], words: str) -> None:
    assert HeadPattern.model_validate(pattern).words() == words


def test_a_column_in_a_window_of_the_block_is_seen_by_those_behind_it() -> None:
    core = config().core.model_copy(update={"pattern": "sliding", "window": 8})
    assert not alone(HeadPattern(columns=(0, 9)), 256, core)
    assert not alone(HeadPattern(columns=(200,)), 256, core)
    assert alone(HeadPattern(columns=(255,)), 256, core)
