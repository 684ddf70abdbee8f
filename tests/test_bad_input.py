"""Wrong plans and arguments, through the command line: message, exit code, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_calls import GOOD, reattend, refused, untouched, with_rule, written

from reattend.errors import (
    EXIT_BAD_INPUT,
    EXIT_REFUSED,
)


@pytest.mark.parametrize(
    ("plan", "code", "parts"),
    [
        (
            with_rule(kv_kep=0.5, kv_keep=None), EXIT_BAD_INPUT,
            ("'kv_kep'", "did you mean 'kv_keep'?"),
        ),
        ({**GOOD, "calibrat": {}}, EXIT_BAD_INPUT, ("'calibrat'", "did you mean 'calibrate'?")),
        (with_rule(to="mlla"), EXIT_BAD_INPUT, ("conversion 'mlla'", "did you mean 'mla'?")),
        ("rules: [sites: {]", EXIT_BAD_INPUT, ("the plan is not YAML", "line 1")),
        ("rules: " + "[" * 5000, EXIT_BAD_INPUT, ("the plan is not YAML", "deeper than any plan")),
        ("extends: transmal", EXIT_BAD_INPUT, ("plan.yaml: extends", "'transmla'?")),
        ("rules:\n  - sites: *\n    to: mla\n", EXIT_BAD_INPUT, ("not YAML", 'sites: "*"')),
        ({**GOOD, "version": 99}, EXIT_BAD_INPUT, ("version 99", "newest", "update reattend")),
        (with_rule(kv_keep=1.5), EXIT_BAD_INPUT, ("kv_keep", "1.5")),
        ({**GOOD, "targets": ["onxx"]}, EXIT_BAD_INPUT, ("'onxx'", "did you mean 'onnx'?")),
        (
            {**GOOD, "targets": [{"onnx": {"flavour": "otr"}}]},
            EXIT_BAD_INPUT,
            ("'otr'", "did you mean 'ort'?"),
        ),
        (
            with_rule(kv_keep=None, kv_lora_rank=4000), EXIT_REFUSED,
            ("2 of 2 sites", "kv_lora_rank 4000 is larger than possible", "to: keep}"),
        ),
        (
            with_rule(sites="model.layers.*.attn"), EXIT_REFUSED,
            ("matches no attention site", "model.layers.0.self_attn", "reattend find"),
        ),
        (with_rule(layers=[7]), EXIT_REFUSED, ("layer 7 does not exist", "2 layers")),
        (
            with_rule(to="keep", kv_keep=None), EXIT_REFUSED,
            ("no site would be converted", "keeps every site"),
        ),
        (
            {
                "rules": [
                    {"sites": "*", "to": "linear", "direction": "bidirectional", "window": 0},
                ],
                "on_refusal": "keep",
            },
            EXIT_REFUSED,
            ("no site would be converted", "self_attn: the block is causal"),
        ),
        (
            with_rule(heads=[0, 2]), EXIT_REFUSED,
            ("heads [2]: the block has 2 KV groups (0 to 1)", "on_refusal: keep"),
        ),
    ],
)  # fmt: skip
def test_plans(
    plan: Any, code: int, parts: tuple[str, ...], tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, plan)
    command = ("convert", tiny_path, "--plan", path, "--data", tiny_text, "--out", tmp_path / "out")
    refused(reattend(*command), code, *parts)
    untouched(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--plan", "transmal"], ("unknown plan 'transmal'", "did you mean 'transmla'?")),
        (["--plan", "no/such.yaml"], ("plan file cannot be read", "no/such.yaml")),
        (["--set", "kv_kep=0.3"], ("'kv_kep'", "did you mean 'kv_keep'?")),
        (["--set", "kv_keep"], ("key=value", "--set kv_keep")),
        (["--dtype", "float23"], ("unknown dtype 'float23'", "float32")),
        (["--dtype", "nn"], ("unknown dtype 'nn'",)),
        (["--dtype", "float8_e4m3fn"], ("unknown dtype 'float8_e4m3fn'", "bfloat16")),
        (["--seed", "-1"], ("whole number from 0", "seed=-1")),
        (["--data", ""], ("--data is empty",)),
        (["--log-json", "no/where/log"], ("event log cannot be written", "another file")),
        (["--device", "cuda:99"], ("cuda:99", "leave device out")),
        (["--device", "toaster"], ("toaster",)),
    ],
)
def test_arguments(
    arguments: list[str], parts: tuple[str, ...], tiny_path: Path, tmp_path: Path
) -> None:
    result = reattend("convert", tiny_path, "--out", tmp_path / "out", *arguments)
    refused(result, EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


def test_no_output_folder(tiny_path: Path) -> None:
    refused(reattend("convert", tiny_path), EXIT_BAD_INPUT, "no output folder", "--dry-run")


@pytest.mark.parametrize(
    "arguments",
    [["convert"], ["convert", "m", "--pla", "x"], ["fnd", "m"], ["convert", "m", "--seed", "many"]],
)
def test_usage_is_explained_by_the_parser(arguments: list[str]) -> None:
    result = reattend(*arguments)
    assert result.exit_code == EXIT_BAD_INPUT
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["convert", "MODEL", "--plan", "transmal", "--out", "OUT"], EXIT_BAD_INPUT, "transmla"),
        (["find", "no/such/model"], EXIT_BAD_INPUT, "no such model folder"),
        (["report", "no/such/result"], EXIT_BAD_INPUT, "report.json"),
    ],
)
def test_as_a_program(
    arguments: list[str], code: int, part: str, tiny_path: Path, tmp_path: Path
) -> None:
    names = {"MODEL": str(tiny_path), "OUT": str(tmp_path / "out")}
    told = subprocess.run(
        [sys.executable, "-m", "reattend", *(names.get(a, a) for a in arguments)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert told.returncode == code, told.stderr
    assert part in told.stderr
    assert told.stdout == ""
    assert "Traceback" not in told.stderr
    untouched(tmp_path)
