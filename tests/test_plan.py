"""Plan: reading, round trip, mistakes, settings and the presets."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from reattend.errors import EXIT_BAD_INPUT, PlanError
from reattend.plan import Calibrate, Plan, Rule


class FakeMla(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    kv_lora_rank: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    qk_rope_head_dim: int | Literal["auto"] | None = None
    kv_keep: float | None = Field(default=None, gt=0)
    balance: float | Literal["derived"] = 1.0
    latent_norm: str = "none"


class FakeDense(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@pytest.fixture(autouse=True)
def _fake_conversions(monkeypatch):
    known = {"mla": FakeMla, "dense": FakeDense}
    registry = SimpleNamespace(
        conversion_names=lambda: sorted(known),
        conversion=lambda name: SimpleNamespace(name=name, Options=known[name]),
    )
    monkeypatch.setitem(sys.modules, "reattend.passes.rewrite.registry", registry)


def simple(**more):
    return {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}], **more}


def test_a_dict_needs_neither_version_nor_calibrate():
    plan = Plan.load(simple())
    assert plan.version == 1
    assert plan.calibrate == Calibrate()
    assert not plan.calibrate.trains
    assert plan.verify.gates == {}
    assert plan.rules[0].options == FakeMla(kv_keep=0.5)


@pytest.mark.smoke
def test_issue_example_reads_from_a_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "version: 1\n"
        "rules:\n"
        '  - sites: "*"\n'
        "    to: mla\n"
        "    kv_lora_rank: 48\n"
        "on_refusal: error\n"
        "calibrate: {tokens: 200_000, stages: [layerwise, end-to-end], seq_len: 256, lr: 1e-4}\n"
        "verify:    {max_ppl_increase: 0.05}\n"
    )
    plan = Plan.load(str(path))
    assert plan == Plan.load(path)
    assert plan.calibrate.tokens == 200_000
    assert plan.calibrate.lr == 1e-4
    assert plan.calibrate.trains
    assert plan.verify.gates == {"max_ppl_increase": 0.05}
    assert plan.rules[0].options.kv_lora_rank == 48


def test_presets_are_found_read_and_differ():
    assert {"identity", "transmla"} <= set(Plan.presets())
    plans = {name: Plan.load(name) for name in ("identity", "transmla")}
    assert plans["identity"].rules[0].to == "dense"
    assert plans["transmla"].rules[0].options.kv_keep == 0.5
    assert plans["identity"].fingerprint() != plans["transmla"].fingerprint()


@pytest.mark.smoke
def test_yaml_round_trip_keeps_the_plan_and_its_fingerprint(tmp_path):
    plan = Plan.load(
        {
            "rules": [
                {"layers": [0, -1, "2:4"], "heads": [1], "to": "mla", "kv_lora_rank": 8},
                {"sites": ["a.*", "re:b.+"], "to": "keep"},
                {"sites": "*", "to": "dense"},
            ],
            "on_refusal": "keep",
            "calibrate": {"tokens": 1000, "lr": 1e-4, "stages": ["layerwise"]},
            "verify": {"min_top1": 0.9},
            "targets": ["onnx"],
        }
    )
    path = tmp_path / "p.yaml"
    path.write_text(plan.to_yaml())
    assert Plan.load(path) == plan
    assert Plan.load(path).fingerprint() == plan.fingerprint()
    assert plan.to_yaml().splitlines()[0] == "version: 1"


def test_fingerprint_sees_values_but_not_spelling():
    plan = Plan.load(simple())
    explicit = simple(version=1, on_refusal="error", calibrate={"tokens": 0})
    assert Plan.load(explicit).fingerprint() == plan.fingerprint()
    other = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.25}]}
    assert Plan.load(other).fingerprint() != plan.fingerprint()
    seeded = simple(calibrate={"seed": 1})
    assert Plan.load(seeded).fingerprint() != plan.fingerprint()
    assert len(plan.fingerprint()) == 64


def test_a_plan_is_frozen_and_passes_through():
    plan = Plan.load(simple())
    assert Plan.load(plan) is plan
    with pytest.raises(Exception, match="frozen"):
        plan.on_refusal = "keep"


def test_constructing_in_python_checks_the_same():
    plan = Plan(rules=[Rule(sites="*", to="mla", kv_keep=0.5)])
    assert plan == Plan.load(simple())
    with pytest.raises(PlanError, match="kv_keep"):
        Rule(sites="*", to="mla", kv_kep=0.5)
    with pytest.raises(PlanError, match="on_refusal"):
        Plan(rules=[], on_refusl="keep")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"on_refussal": "keep"}, ["on_refussal", "'on_refusal'"]),
        ({"calibrate": {"token": 3}}, ["plan: calibrate", "'tokens'"]),
        ({"verify": {"max_ppl": 0.1}}, ["plan: verify", "'max_ppl_increase'"]),
        ({"rules": [{"sites": "*", "to": "mla", "kv_rank": 1}]}, ["rules.0", "'kv_lora_rank'"]),
        ({"rules": [{"site": "*", "to": "mla", "layers": 0}]}, ["rules.0", "'sites'"]),
        ({"rules": [{"sites": "*", "to": "keep", "layer": 1}]}, ["rules.0", "'layers'"]),
        ({"rules": [{"sites": "*", "to": "mla2"}]}, ["rules.0", "'mla'"]),
        ({"rules": [{"sites": "*", "to": "mla", "options": {}}]}, ["'options'"]),
        ({"rules": [{"sites": "*", "too": "mla"}]}, ["`to` is missing", "'too'"]),
        ({"rules": [{"to": "mla"}]}, ["neither `sites` nor `layers`"]),
        ({"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 0}]}, ["kv_lora_rank", "got 0"]),
        ({"rules": [{"sites": "re:(", "to": "mla"}]}, ["regular expression"]),
        ({"rules": [{"layers": ["1-3"], "to": "mla"}]}, ["1-3", "slice"]),
        ({"rules": [{"layers": [True], "to": "mla"}]}, ["layers must be", "True"]),
        ({"rules": [{"layers": ["::0"], "to": "mla"}]}, ["::0", "slice"]),
        ({"rules": [{"sites": [], "to": "mla"}]}, ["empty list"]),
        ({"rules": [{"sites": "*", "heads": [1, 1], "to": "mla"}]}, ["KV group once"]),
        ({"rules": [{"sites": "*", "heads": [-1], "to": "mla"}]}, ["heads must be", "-1"]),
        ({"rules": []}, ["no rules"]),
        ({"rules": {"sites": "*"}}, ["no rules", "list"]),
        ({"rules": ["mla"]}, ["rules.0", "mapping"]),
        ({"on_refusal": False}, ["on_refusal", "keep"]),
        ({"calibrate": {"stages": ["layer"]}}, ["stages must be", "layerwise", "'layer'"]),
        ({"calibrate": {"stages": ["layerwise", "layerwise"]}}, ["twice"]),
        ({"calibrate": {"tokens": -1}}, ["tokens", "got -1"]),
        ({"calibrate": {"lr": float("nan")}}, ["lr"]),
        ({"calibrate": [1]}, ["calibrate", "mapping"]),
        ({"verify": {"min_top1": 2}}, ["min_top1"]),
        ({"version": 2}, ["version 2", "newer"]),
        ({"version": "1"}, ["version"]),
        ({"version": 0}, ["version"]),
        ({"version": True}, ["version"]),
        ({"extends": 3}, ["extends"]),
    ],
)
def test_mistakes_are_named(change, names):
    with pytest.raises(PlanError) as caught:
        Plan.load({**simple(), **change})
    for name in names:
        assert name in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize("source", [None, 5, [{"sites": "*", "to": "mla"}]])
def test_what_is_no_plan_is_named_by_its_type(source):
    with pytest.raises(PlanError, match=rf"cannot be a {type(source).__name__}\b"):
        Plan.load(source)


def test_a_newer_version_is_reported_before_its_unknown_keys():
    with pytest.raises(PlanError, match="newer"):
        Plan.load({"version": 2, "rulez": []})


def test_set_changes_keys_of_rules_and_never_all_rules():
    with pytest.raises(PlanError, match="one key of a rule, not all rules"):
        Plan.load("transmla").with_set(["rules=3"])


def test_set_reaches_rules_sections_and_bare_options():
    plan = Plan.load(
        {
            "rules": [
                {"layers": [0], "to": "keep"},
                {"layers": [1], "to": "mla", "kv_lora_rank": 8},
                {"sites": "*", "to": "mla", "kv_keep": 0.5},
            ]
        }
    )
    new = plan.with_set(
        [
            "kv_lora_rank=48",
            "rules.1.latent_norm=rms",
            "rules.2.kv_keep=null",
            "calibrate.lr=1e-4",
            "on_refusal=keep",
            "targets=[onnx]",
        ]
    )
    assert new.rules[1].options == FakeMla(kv_lora_rank=48, latent_norm="rms")
    assert new.rules[2].options == FakeMla(kv_lora_rank=48)
    assert (new.calibrate.lr, new.on_refusal, new.targets) == (1e-4, "keep", ("onnx",))
    assert plan.rules[1].options.kv_lora_rank == 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kv_lora_rnk=4", "'kv_lora_rank'"),
        ("kv_lora_rank", "key=value"),
        ("rules.7.kv_keep=1", "no such rule"),
        ("rules.0=keep", "not a whole rule"),
        ("rules.0.kv_kep=1", "'kv_keep'"),
        ("calibrat.tokens=1", "'calibrate'"),
        ("calibrate.tokns=1", "'tokens'"),
        ("kv_lora_rank=0", "got 0"),
        ("on_refusal=off", "on_refusal"),
        ("kv_keep=[", "not YAML"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(PlanError) as caught:
        Plan.load(simple()).with_set([setting])
    assert message in str(caught.value)


def test_importing_the_plan_imports_no_torch():
    code = "import sys, reattend.plan; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
