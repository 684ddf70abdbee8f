"""Every value that a plan may not hold is told in our words, by dict, file, setting and preset."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from reattend.cli import app
from reattend.errors import PlanError
from reattend.plan import Plan
from reattend.plan_schema import allowed
from reattend.plan_text import build

RANK = "a whole number >= 1, a list of whole numbers >= 1, auto or null"
RULE: list[tuple[dict[str, Any], str]] = [
    ({"kv_lora_rank": 0}, f"kv_lora_rank must be {RANK}, got 0"),
    ({"kv_lora_rank": -3}, f"kv_lora_rank must be {RANK}, got -3"),
    ({"kv_lora_rank": "many"}, f"kv_lora_rank must be {RANK}, got 'many'"),
    ({"kv_lora_rank": 1.5}, f"kv_lora_rank must be {RANK}, got 1.5"),
    ({"kv_lora_rank": [8, 0]}, f"kv_lora_rank must be {RANK}, got [8, 0]"),
    ({"kv_lora_rank": True}, f"kv_lora_rank must be {RANK}, got true"),
    ({"kv_lora_rank": {"r": 8}}, f"kv_lora_rank must be {RANK}, got {{'r': 8}}"),
    ({"kv_keep": 0}, "kv_keep must be a number > 0 and <= 1 or null, got 0"),
    ({"kv_keep": 2}, "kv_keep must be a number > 0 and <= 1 or null, got 2"),
    ({"kv_keep": float("nan")}, "kv_keep must be a number > 0 and <= 1 or null, got nan"),
    ({"kv_keep": True}, "kv_keep must be a number > 0 and <= 1 or null, got true"),
    ({"qk_rope_head_dim": -2}, "qk_rope_head_dim must be a whole number >= 0, a list"),
    ({"fold": 0}, "fold must be a whole number >= 1 or auto, got 0"),
    ({"balance": -1}, "balance must be a number >= 0.001 and <= 1000"),
    ({"latent_norm": "layer"}, "latent_norm must be none or rms, got 'layer'"),
    ({"q_lora_rank": 0}, "q_lora_rank must be a whole number >= 1 or null, got 0"),
    ({"shrinkage": 1}, "shrinkage must be a number >= 0 and < 1 or derived, got 1"),
    ({"allow_growth": "maybe"}, "allow_growth must be true or false, got 'maybe'"),
    ({"mixing": "none"}, "mixing: none does not go with rope_select: global"),
    ({"layers": {}}, "layers must be a list of a whole number or a text or null, got {}"),
    ({"layers": "x"}, "layers: 'x' is neither a layer number nor a slice like '2:10'"),
    ({"heads": [-1]}, "heads must be a list of whole numbers >= 0 or null, got [-1]"),
    ({"heads": "a"}, "heads must be a list of whole numbers >= 0 or null, got 'a'"),
    ({"sites": 3}, "sites must be a list of texts or null, got 3"),
]
INSIDE: list[tuple[dict[str, Any], str]] = [
    ({"pattern": 3}, "pattern must be a mapping, got 3"),
    ({"pattern": {"windw": 3}}, "pattern has no key 'windw'"),
    ({"pattern": {"sinks": -1}}, "pattern.sinks must be a whole number >= 0, got -1"),
    ({"pattern": {"window": "x"}}, "pattern.window must be a whole number, got 'x'"),
    ({"pattern": {"stride": {"period": 0}}}, "pattern.stride.period must be a whole number > 0"),
    ({"pattern": {"stride": {}}}, "pattern.stride.period is missing"),
    ({"pattern": {}}, "pattern: a pattern needs a term"),
    ({"candidates": [{"window": 3}, {"wnd": 2}], "kv_density": 0.5}, "candidates.1 has no key"),
    ({"keep_full": 0.5}, "keep_full needs a `pattern`"),
    ({"pattern": {"windw": 3}}, "did you mean 'window'? known here: columns, full, grid, powers"),
    ({"pattern": {"window": True}}, "pattern.window must be a whole number, got true"),
    (
        {"pattern": {"window": 8, "sinks": "4"}},
        "pattern.sinks must be a whole number >= 0, got '4'",
    ),
    (
        {"pattern": {"slashes": [1, "2"]}},
        "pattern.slashes must be a list of whole numbers, got [1,",
    ),
    ({"pattern": {"window": 8}, "evict": "yes"}, "evict must be true or false or null, got 'yes'"),
    ({"pattern": {"window": 8}, "chosen": "me"}, "unknown key 'chosen'"),
    (
        {"candidates": [{"window": 3}, {"window": "9"}], "kv_density": 0.5},
        "candidates.1.window must",
    ),
]
SHARE = "pattern.select.ratio must be a number > 0.0 and <= 1.0 or null, got"
SELECT: list[tuple[dict[str, Any], str]] = [
    ({"kind": "blocks", "ratio": 1.5}, f"{SHARE} 1.5"),
    ({"kind": "gate", "ratio": 0}, f"{SHARE} 0"),
    ({"kind": "gate", "ratio": 0.5, "queries": "each"}, "pattern.select has no key 'queries'"),
    (
        {"kind": "blocks", "ratio": 0.5, "quer": "each"},
        "did you mean 'queries'? known here: across",
    ),
    (
        {"kind": "block", "topk": 3},
        "pattern.select.kind must be vertical-slash, blocks, observed, ",
    ),
    ({"kind": "block", "topk": 3}, "or recorded, got 'block' (did you mean 'blocks'?)"),
    ({"topk": 3}, "pattern.select.kind is missing (got {'topk': 3})"),
    ({"kind": "recorded"}, "pattern.select.at is missing"),
    ({"kind": "recorded", "at": [-1]}, "select.at must be a list of whole numbers >= 0, got [-1]"),
    ({"kind": "blocks"}, "pattern.select: give exactly one budget"),
    ({"kind": "blocks", "topk": "3"}, "pattern.select.topk must be a whole number > 0 or null"),
]
SECTIONS: list[tuple[dict[str, Any], str]] = [
    ({"calibrate": {"tokens": -1}}, "tokens must be a whole number >= 0, got -1"),
    ({"calibrate": {"tokens": True}}, "tokens must be a whole number >= 0, got true"),
    ({"calibrate": {"seq_len": None}}, "seq_len must be a whole number >= 2, got null"),
    ({"calibrate": {"lr": 0}}, "lr must be a number > 0 or null, got 0"),
    ({"calibrate": {"stages": ["last"]}}, "stages must be a list of layerwise or end-to-end, got"),
    ({"calibrate": {"data": 3}}, "data must be a text or null, got 3"),
    ({"verify": {"min_top1": 2}}, "min_top1 must be a number >= 0 and <= 1 or null, got 2"),
    ({"verify": {"yardsticks": "perhaps"}}, "yardsticks must be true or false, got 'perhaps'"),
    ({"verify": {"peer_keep": [0.5]}}, "sizes of peers: name some under peers"),
    ({"verify": {"rows": 4}}, "of the text to measure on: name it under data"),
    ({"calibrate": {"loss": "lm", "stages": ["layerwise"]}}, "write stages: [end-to-end]"),
    ({"on_refusal": "maybe"}, "on_refusal must be error or keep, got 'maybe'"),
    ({"targets": "onnx"}, "targets must be a list of a text or a mapping, got 'onnx'"),
]
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"rules": [{1: 2}]}, "`to` is missing"),
    ({"rules": ["mla"]}, "found str: 'mla'"),
    ({"rules": [{"sites": "*", "to": 3}]}, "keep, linear, "),
    ({"rules": [{"sites": "*", "to": "keep", "kv_keep": 1}]}, "known here: heads, layers"),
    ({1: 2, "rules": []}, "known here: calibrate"),
    ({"rules": [], "extends": ["transmla"]}, "got ['transmla']"),
    ({"rules": [], "extends": ""}, "transmla-paper"),
]


def whole(case: dict[str, Any]) -> dict[str, Any]:
    if case.keys() <= {"calibrate", "verify", "on_refusal", "targets"}:
        return {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}], **case}
    to = "sparse" if case.keys() & {"pattern", "candidates", "keep_full"} else "mla"
    return {"rules": [{"sites": "*", "to": to, **case}]}


def told(message: str, part: str) -> None:
    """What, where, why and next, and nothing of pydantic."""
    assert part in message, message
    for label in ("  where: ", "  why: ", "  next: "):
        assert f"\n{label}" in message, message
    for word in ("Input should", "constrained-", "pydantic", "literal[", "NoneType"):
        assert word not in message, message


@pytest.mark.parametrize(("case", "part"), RULE + INSIDE + SECTIONS, ids=str)
def test_a_value_that_is_not_allowed(case, part):
    with pytest.raises(PlanError) as caught:
        Plan.load(whole(case))
    told(str(caught.value), part)


@pytest.mark.parametrize(("select", "part"), SELECT, ids=str)
def test_a_selector_that_is_not_allowed(select, part):
    """By the kind that is written; the plan to look at is one with the same conversion."""
    with pytest.raises(PlanError) as caught:
        Plan.load(whole({"pattern": {"select": select}}))
    told(str(caught.value), part)
    assert "plans show a-shape`" in str(caught.value)


@pytest.mark.parametrize(("plan", "part"), FORMS, ids=str)
def test_a_form_that_is_not_allowed(plan, part):
    with pytest.raises(PlanError) as caught:
        Plan.load(plan)
    told(str(caught.value), part)


@pytest.mark.parametrize(("case", "part"), [RULE[0], SECTIONS[0]], ids=str)
def test_the_same_words_for_a_file(tmp_path: Path, case, part):
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(whole(case)))
    result = CliRunner().invoke(app, ["plans", "check", str(file)])
    assert result.exit_code == 2
    told(result.stderr, part)
    assert str(file) in result.stderr


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("kv_lora_rank=0", RULE[0][1]),
        ("rules.0.kv_keep=2", RULE[8][1]),
        ("calibrate.tokens=-1", SECTIONS[0][1]),
        ("rules.7.kv_keep=0.5", "the plan has 1 rules"),
        ("rules.0=3", "a whole rule"),
        ("kv_keep", "key=value"),
    ],
)
def test_the_same_words_for_a_setting_of_a_preset(setting, part):
    with pytest.raises(PlanError) as caught:
        Plan.load("transmla").with_set([setting])
    message = str(caught.value)
    assert part in message
    assert "\n  where: " in message
    assert "\n  next: " in message


class Odd(BaseModel):
    """Options of a conversion that is not ours, with types that ours do not have."""

    model_config = {"arbitrary_types_allowed": True}
    pair: tuple[int, Literal["a", "b"]] = (0, "a")
    table: dict[str, int] = {}
    number: Annotated[int, Field(multiple_of=2)] = 0


class Strange(BaseModel):
    """A type without a JSON schema."""

    model_config = {"arbitrary_types_allowed": True}
    done: slice = slice(0)


def test_options_of_any_pydantic_model_are_told():
    assert allowed(Odd, ("table",)) == "a mapping"
    for data in ({"pair": 3}, {"table": 3}, {"number": 3}, {"number": True}):
        with pytest.raises(PlanError, match=f"{next(iter(data))} must be"):
            build(Odd, data, "here")
    assert allowed(Strange, ("done",)) == ""
    with pytest.raises(PlanError, match="done: .*instance of slice, got '3'"):
        build(Strange, {"done": "3"}, "here")


def test_set_reaches_inside_an_option():
    plan = Plan.load({"rules": [{"sites": "*", "to": "sparse"}]})
    new = plan.with_set(["pattern.window=9", "pattern.stride.period=4", "rules.0.pattern.sinks=2"])
    assert new.to_dict()["rules"][0]["pattern"] == {
        "window": 9, "stride": {"period": 4}, "sinks": 2,
    }  # fmt: skip
    with pytest.raises(PlanError, match="did you mean 'pattern'"):
        plan.with_set(["patern.window=9"])
