"""Where plans come from: presets, files, `extends`; a stored file means what it always did."""

from pathlib import Path

import pytest

from reattend.errors import EXIT_BAD_INPUT, PlanError
from reattend.plan import Plan
from reattend.plan_source import PLAN_VERSION

DATA = Path(__file__).parent / "data"

#: what plan-1.yaml, written by hand with every key a plan has, says
STORED = {
    "version": 1,
    "rules": [
        {"layers": [0, -1], "to": "keep"},
        {
            "sites": ["model.layers.1.*", "re:.*\\.2\\.self_attn"], "heads": [0, 2], "to": "mla",
            "kv_lora_rank": 48, "qk_rope_head_dim": 16, "mixing": "real",
            "rope_select": "per-frequency", "phase": "one", "rope_table": "strided",
            "latent": "pca", "balance": "none", "center": False, "fold": 2, "latent_norm": "rms",
        },
        {"sites": "*", "to": "mla", "kv_keep": 0.25},
    ],
    "on_refusal": "keep",
    "calibrate": {
        "tokens": 200_000, "stages": ["layerwise", "end-to-end"], "seq_len": 128, "batch_size": 4,
        "lr": 1e-4, "data": "text.txt", "seed": 3, "statistics_tokens": 4096, "lora_rank": 8,
    },
    "verify": {
        "max_ppl_increase": 0.05, "min_top1": 0.8, "min_recall": 0.5, "max_kl": 0.1,
        "yardsticks": True,
    },
    "targets": ["onnx"],
}  # fmt: skip


def test_the_stored_plan_says_what_it_said():
    plan = Plan.load(DATA / "plan-1.yaml")
    assert plan.to_dict() == STORED
    assert (plan.rules[1].heads, plan.rules[1].options.fold) == ((0, 2), 2)
    assert plan.rules[2].options.kv_lora_rank is None
    paths = [f"model.layers.{i}.self_attn" for i in range(4)]
    chosen = [[rule.to for rule in rules] for rules in plan.assign(paths).values()]
    assert chosen == [["keep"], ["mla", "mla"], ["mla", "mla"], ["keep"]]


def test_the_stored_plan_with_a_newer_version_is_refused(tmp_path):
    text = (DATA / f"plan-{PLAN_VERSION}.yaml").read_text("utf-8")
    assert text.startswith(f"version: {PLAN_VERSION}\n")
    newer = tmp_path / "newer.yaml"
    newer.write_text(text.replace(f"version: {PLAN_VERSION}", f"version: {PLAN_VERSION + 1}", 1))
    with pytest.raises(PlanError, match=f"version {PLAN_VERSION + 1}, newer") as caught:
        Plan.load(newer)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_unknown_preset_and_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"unknown plan 'transmal'[\s\S]*'transmla'"):
        Plan.load("transmal")
    with pytest.raises(PlanError, match="no such file"):
        Plan.load(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="no such file"):
        Plan.load("none.yaml")
    with pytest.raises(PlanError, match="folder"):
        Plan.load(tmp_path)


def test_extends_puts_own_rules_first_and_merges_sections(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "extends: transmla\ncalibrate: {tokens: 5, seq_len: 64}\nverify: {max_kl: 1}\n"
    )
    (tmp_path / "top.yaml").write_text(
        "extends: base.yaml\nrules: [{layers: [0], to: keep}]\ncalibrate: {tokens: 7}\n"
    )
    plan = Plan.load(tmp_path / "top.yaml")
    assert [r.to for r in plan.rules] == ["keep", "mla"]
    assert (plan.calibrate.tokens, plan.calibrate.seq_len) == (7, 64)
    assert plan.verify.max_kl == 1
    assert plan.extends is None
    assert Plan(extends="transmla") == Plan.load("transmla")


def test_a_circle_of_extends_is_an_error(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(PlanError, match="circle"):
        Plan.load(tmp_path / "a.yaml")
