"""Exports that cannot be, missing packages, and result folders that are damaged."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_calls import FAST, cut, reattend, refused, untouched

from reattend import load
from reattend.errors import (
    EXIT_BAD_INPUT,
    EXIT_GATE,
    EXIT_MISSING,
    ArgumentError,
)


@pytest.fixture(scope="module")
def converted(tiny_path: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    result = reattend("convert", tiny_path, "--data", tiny_text, "--out", out, *FAST)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_export_without_its_extra(
    package: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = reattend("export", converted, "--out", tmp_path / "out")
    refused(result, EXIT_MISSING, package, "pip install 'reattend[onnx]'")
    untouched(tmp_path)


@pytest.mark.parametrize("target", ["onnx", "deepseek"])
def test_export_of_what_was_never_converted(target: str, tiny_path: Path, tmp_path: Path) -> None:
    result = reattend("export", tiny_path, "--target", target, "--out", tmp_path / "out")
    told = refused(result, EXIT_BAD_INPUT, "an ordinary checkpoint", str(tiny_path), "'llama'")
    assert f"reattend convert {tiny_path} --plan identity --out" in told
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda config: config.pop("reattend"), "no `reattend` section"),
        (lambda config: config.update(reattend=3), "no `reattend` section"),
        (lambda config: config["reattend"].update(format="one"), "no format number"),
        (lambda config: config["reattend"].update(base_model_type="lama"), "no model type 'lama'"),
        (lambda config: config["reattend"].pop("base_model_type"), "no model type None"),
        (lambda config: config.pop("architectures"), "does not name the model's class"),
        (lambda config: config.update(architectures=["ReattendLama"]), "no class Lama"),
    ],
)
def test_a_config_that_was_damaged(
    change: Callable[[dict[str, Any]], Any], part: str, converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    result = reattend("export", folder, "--out", tmp_path / "out")
    refused(result, EXIT_BAD_INPUT, part, str(folder))
    untouched(tmp_path)


def test_lora_without_peft(
    tiny_path: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    settings = ["--set", "calibrate.tokens=1000", "--set", "calibrate.lora_rank=2"]
    refused(reattend(*command, *settings), EXIT_MISSING, "peft", "pip install")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_page_says_so(
    tiny_path: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    result = reattend("convert", tiny_path, "--data", tiny_text, "--out", out, *FAST)
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text()
    assert "matplotlib" in page
    assert "<svg" not in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dtype", "bfloat16"], ("dtype 'bfloat16'", "float32")),
        (["--target", "tensorrt"], ("'tensorrt'", "onnx")),
    ],
)
def test_exports_that_do_not_exist(
    arguments: list[str], parts: tuple[str, ...], converted: Path, tmp_path: Path
) -> None:
    result = reattend("export", converted, "--out", tmp_path / "out", *arguments)
    refused(result, EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


@pytest.mark.parametrize("command", ["export", "verify", "report"])
def test_folders_that_are_no_result(command: str, tiny_path: Path, tmp_path: Path) -> None:
    extra = ["--out", tmp_path / "out"] if command == "export" else []
    refused(reattend(command, tmp_path / "none", *extra), EXIT_BAD_INPUT, "none")
    refused(reattend(command, tiny_path, *extra), EXIT_BAD_INPUT)
    untouched(tmp_path)


def test_results_that_are_damaged(converted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(converted, tmp_path / "copy"))
    (copy / "report.json").write_text("{")
    refused(reattend("report", copy), EXIT_BAD_INPUT, "report.json is damaged", "report.json")
    (copy / "config.json").write_text("no")
    shutil.copy(converted / "report.json", copy / "report.json")
    refused(reattend("verify", copy), EXIT_BAD_INPUT, "config.json is not JSON")
    shutil.copy(converted / "config.json", copy / "config.json")
    cut(0.9)(copy)
    refused(reattend("verify", copy), EXIT_BAD_INPUT, "damaged or cut short")
    shutil.copy(converted / "model.safetensors", copy / "model.safetensors")
    (copy / "report.md").write_text("other")
    refused(reattend("verify", copy), EXIT_GATE, "checks failed", "report.md")


def test_a_checkpoint_from_the_future(converted: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(converted, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["reattend"]["format"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    for command in (["verify", copy], ["export", copy, "--out", tmp_path / "out"]):
        refused(reattend(*command), EXIT_BAD_INPUT, "format 99", "pip install -U reattend")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"foo": 3}, "unexpected keyword"),
        ({"dtype": "flat"}, "dtype"),
        ({"model": 5}, "holds whole"),
    ],
)
def test_loading_with_wrong_arguments(given: dict[str, Any], words: str, converted: Path) -> None:
    with pytest.raises(ArgumentError, match=words):
        load(converted, **given)
