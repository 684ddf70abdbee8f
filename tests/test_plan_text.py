"""The YAML reader: 1.2 rules, and one clear error for everything that is not a plan."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from reattend.errors import PlanError
from reattend.plan_text import build, parse_yaml, read_mapping
from reattend.plan_words import nearest


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e5", 1e5),
        ("off", "off"),
        ("yes", "yes"),
        ("200_000", 200_000),
        ("010", 10),
        ("2:10", "2:10"),
        ("1:30", "1:30"),
        ("'::2'", "::2"),
        ("true", True),
        ("null", None),
        ("[0, 2, -1]", [0, 2, -1]),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    got = parse_yaml(f"a: {text}", "here")["a"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("a: 1\na: 2", "duplicate key"),
        ("sites: *", "quotes"),
        ("a: !!python/object:os.system {}", "constructor"),
        ("a: 1\n---\nb: 2", "single document"),
        ("\tx: 1", "not YAML"),
    ],
)
def test_what_is_not_yaml_is_a_plan_error(text, message):
    with pytest.raises(PlanError, match=message) as caught:
        parse_yaml(text, "my.yaml")
    assert "my.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n", "3\n"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match="mapping"):
        read_mapping(path, "p.yaml")


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(PlanError, match="UTF-8"):
        read_mapping(path, "p.yaml")
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_mapping(path, "p.yaml") == {"a": 1}


def test_nearest_is_none_when_nothing_is_near():
    assert nearest("kv_rank", ["kv_lora_rank", "fold"]) == ["kv_lora_rank"]
    assert nearest("zzz", ["kv_lora_rank", "fold"]) == []


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rank: int = Field(default=1, ge=1)
    need: str


def test_build_names_key_value_and_missing_keys():
    assert build(Options, {"need": "x"}, "here").rank == 1
    with pytest.raises(PlanError, match="number >= 1, got -1; need is missing"):
        build(Options, {"rank": -1}, "here")
    with pytest.raises(PlanError, match="did you mean 'rank'"):
        build(Options, {"rnk": 1, "need": "x"}, "here")
