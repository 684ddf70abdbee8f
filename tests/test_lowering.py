"""A plan's targets: lowered inside the conversion, published with it or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models

from reattend import Plan, convert
from reattend.errors import EXIT_MISSING, MissingExtraError, PlanError, RefusedError
from reattend.lowering import check_targets
from reattend.report import Run

RULE = {"sites": "*", "to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 8}
DATA = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_the_artifact_lies_in_the_folder_and_gives_the_models_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from reattend.targets.onnx import Session

    plan = {"rules": [RULE], "targets": [{"onnx": {"flavour": "ort"}}]}
    result = convert(zoo_models.build("llama"), plan, data=DATA, out=tmp_path / "out")
    assert json.loads((tmp_path / "out/onnx/manifest.json").read_text())["flavour"] == "ort"
    assert {"model.onnx", "manifest.json"} <= {p.name for p in (tmp_path / "out/onnx").iterdir()}
    assert "lower to onnx" in [s.name for s in Run.load(tmp_path / "out").stages]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    ids = DATA[:2, :11]
    got = torch.as_tensor(Session(tmp_path / "out/onnx").logits(ids.numpy()))
    with torch.no_grad():
        assert (got - result.model(ids).logits).abs().max() <= 1e-4
    again = convert(zoo_models.build("llama"), plan, data=DATA, out=tmp_path / "out")
    assert again.out == tmp_path / "out"  # complete: nothing to do


def test_what_cannot_be_lowered_publishes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    plan = {"rules": [{**RULE, "layers": [0]}], "targets": ["onnx"]}
    with pytest.raises(RefusedError):
        convert(zoo_models.build("llama"), plan, data=DATA, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets_need_a_folder_and_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: dict[str, Any] = {"rules": [RULE], "targets": ["onnx"]}
    with pytest.raises(PlanError, match="no folder"):
        convert(zoo_models.build("llama"), plan, data=DATA)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError) as missing:
        convert(zoo_models.build("llama"), plan, data=DATA, out=tmp_path / "out")
    assert missing.value.exit_code == EXIT_MISSING
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"onnx": {"flavor": "ort"}}, "did you mean 'flavour'"),
        ({"onnx": {"flavour": "otr"}}, "did you mean 'ort'"),
        ({"deepseek": {"flavour": "ort"}}, "flavour is for the target onnx"),
        ({"onnx": {}, "deepseek": {}}, "a target is a name"),
        (["onnx"], "a target is a name"),
    ],
)
def test_wrong_options_of_a_target(target: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=words):
        check_targets(Plan.load({"rules": [RULE], "targets": [target]}), tmp_path / "out")


def test_a_target_with_options_is_written_as_it_was_read() -> None:
    targets = [{"onnx": {"flavour": "ort"}}, "deepseek"]
    plan = Plan.load({"rules": [RULE], "targets": targets})
    assert plan.to_dict()["targets"] == targets
    assert Plan.load(plan.to_dict()) == plan
    assert Plan.load({"rules": [RULE], "targets": [{"onnx": None}]}).to_dict()["targets"] == [
        "onnx"
    ]
