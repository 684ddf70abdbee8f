"""Every mistake of the catalogue, through the command line: message, exit code, nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from reattend.cli import app
from reattend.errors import (
    EXIT_BAD_INPUT,
    EXIT_GATE,
    EXIT_MISSING,
    EXIT_REFUSED,
)

GOOD = {"version": 1, "rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]}
FAST = ["--set", "calibrate.seq_len=64", "--set", "calibrate.statistics_tokens=512"]
Change = Callable[[Path], Any]


def reattend(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Any, code: int, *parts: str) -> str:
    """The command ended with this code and a message with these parts; returns the message."""
    text: str = result.stderr
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert text.startswith("error: "), text
    assert text.count("error: ") == 1, text
    assert "\n  next: " in text, text
    for part in parts:
        assert part in text, f"{part!r} is not in:\n{text}"
    assert "Traceback" not in result.output
    return text


def untouched(folder: Path) -> None:
    """No output, no partial output, no temporary file."""
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]


@pytest.fixture
def model(tiny_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_path, tmp_path / "model"))


def written(tmp_path: Path, plan: Any) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    return path


def with_rule(**changes: Any) -> dict[str, Any]:
    rule = {k: v for k, v in {**GOOD["rules"][0], **changes}.items() if v is not None}  # type: ignore[index]
    return {"version": 1, "rules": [rule]}


# Plans


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
        ("rules:\n  - sites: *\n    to: mla\n", EXIT_BAD_INPUT, ("not YAML", 'sites: "*"')),
        ({**GOOD, "version": 99}, EXIT_BAD_INPUT, ("version 99", "newest", "update reattend")),
        (with_rule(kv_keep=1.5), EXIT_BAD_INPUT, ("kv_keep", "1.5")),
        ({**GOOD, "targets": ["onxx"]}, EXIT_BAD_INPUT, ("'onxx'", "did you mean 'onnx'?")),
        (
            with_rule(kv_keep=None, kv_lora_rank=4000), EXIT_REFUSED,
            ("2 of 2 sites", "kv_lora_rank 4000 is larger than possible", "to: keep}"),
        ),
        (
            with_rule(sites="model.layers.*.attn"), EXIT_REFUSED,
            ("matches no attention site", "model.layers.0.self_attn", "reattend find"),
        ),
        (with_rule(layers=[7]), EXIT_REFUSED, ("layer 7 does not exist", "2 layers")),
        (with_rule(to="keep", kv_keep=None), EXIT_REFUSED, ("no site would be converted",)),
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


# Models


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def edit(model: Path) -> None:
        file = model / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def edit_config(**entries: Any) -> Change:
    def edit(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return edit


def cut(share: float) -> Change:
    def edit(model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return edit


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_of_two(model: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def poison(name: str, value: float) -> Change:
    return edit_weights(lambda w: w[name].view(-1)[3].fill_(value))


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (shutil.rmtree, ("no such model folder",)),
        (lambda m: (m / "config.json").unlink(), ("no config.json",)),
        (lambda m: (m / "config.json").write_text("{"), ("config.json is not JSON",)),
        (lambda m: (m / "config.json").write_text("[]"), ("not a JSON object",)),
        (lambda m: (m / "model.safetensors").unlink(), ("no safetensors weights",)),
        (only_pickle, ("pytorch_model.bin", "could run code")),
        (cut(0.5), ("damaged or cut short", "model.safetensors")),
        (cut(0), ("damaged or cut short", "model.safetensors")),
        (lambda m: (m / "model.safetensors").write_bytes(os.urandom(5000)), ("damaged",)),
        (index_of_two, ("a weight file is missing", "model-2.safetensors")),
        (edit_weights(lambda w: w.pop(K)), ("does not hold every weight", K)),
        (edit_weights(lambda w: w.update({K: w[K][:3].clone()})), ("cannot be loaded",)),
        (poison(K, float("nan")), ("a weight holds NaN", K)),
        (poison(K, float("inf")), ("a weight holds infinity", K)),
        (edit_config(auto_map={"AutoModelForCausalLM": "m.M"}), ("would be executed", "trust")),
        (edit_config(quantization_config={"quant_method": "gptq"}), ("quantised",)),
        (edit_config(model_type="zebra", architectures=["ZebraForCausalLM"]), ("zebra",)),
    ],
)
def test_models(
    change: Change, parts: tuple[str, ...], model: Path, tiny_text: Path, tmp_path: Path
) -> None:
    change(model)
    out = tmp_path / "out"
    refused(reattend("convert", model, "--data", tiny_text, "--out", out), EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


def test_code_in_the_models_folder_is_not_run(model: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (model / "m.py").write_text(f"open({str(mark)!r}, 'w')\n")
    edit_config(auto_map={"AutoModelForCausalLM": "m.M", "AutoConfig": "m.C"})(model)
    refused(reattend("find", model), EXIT_BAD_INPUT, "would be executed")
    assert not mark.exists()


# Data


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none.txt", None, ("does not exist", "none.txt")),
        ("a.txt", b"", ("empty", "0 bytes")),
        ("a.txt", b"good \xe9 bad", ("not UTF-8", "byte 5", "iconv")),
        ("a.txt", b"too short", ("too short",)),
        ("a.jsonl", b'{"txt": "a"}\n', ("`text`", "a.jsonl:1")),
        ("a.jsonl", b"{", ("not JSON", "a.jsonl:1")),
        ("a.csv", b"a,b", (".csv",)),
    ],
)
def test_data(
    name: str, content: bytes | None, parts: tuple[str, ...], tiny_path: Path, tmp_path: Path
) -> None:
    data = tmp_path / name
    if content is not None:
        data.write_bytes(content)
    result = reattend("convert", tiny_path, "--data", data, "--out", tmp_path / "out")
    refused(result, EXIT_BAD_INPUT, *parts)
    untouched(tmp_path)


def test_text_without_a_tokenizer(model: Path, tiny_text: Path, tmp_path: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    result = reattend("convert", model, "--data", tiny_text, "--out", tmp_path / "out")
    refused(result, EXIT_BAD_INPUT, "needs a tokenizer")
    untouched(tmp_path)


@pytest.mark.parametrize("setting", ["calibrate.tokens=1000", "verify.max_ppl_increase=0.1"])
def test_training_and_gates_need_text(setting: str, tiny_path: Path, tmp_path: Path) -> None:
    result = reattend("convert", tiny_path, "--set", setting, "--out", tmp_path / "out")
    refused(result, EXIT_BAD_INPUT, "real text", "--data")
    untouched(tmp_path)


# Numbers that break down on the way


def test_a_failed_gate_publishes_nothing(tiny_path: Path, tiny_text: Path, tmp_path: Path) -> None:
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    result = reattend(*command, "--set", "verify.max_kl=0.0")
    refused(result, EXIT_GATE, "failed verification; nothing was published", "max_kl", "limit")
    assert not (tmp_path / "out").exists()


def test_nan_while_it_trains(tiny_path: Path, tiny_text: Path, tmp_path: Path) -> None:
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    result = reattend(*command, "--set", "calibrate.tokens=4000", "--set", "calibrate.lr=1e30")
    refused(result, EXIT_GATE, "NaN or infinity", "stage layerwise, step", "lower calibrate.lr")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_activations_overflow(model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Every weight is finite; what the first block hands on is not."""

    def grow(weights: dict[str, torch.Tensor]) -> None:
        for name, factor in (("gate", 1e3), ("up", 1e3), ("down", 1e38)):
            weights[f"model.layers.0.mlp.{name}_proj.weight"].mul_(factor)

    edit_weights(grow)(model)
    command = ["convert", model, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    refused(reattend(*command), EXIT_BAD_INPUT, "NaN or infinity")
    assert not (tmp_path / "out").exists()


# Outputs


@pytest.mark.parametrize("kind", ["file", "folder", "partial", "below a file", "named partial"])
def test_outputs_that_are_taken(
    kind: str, tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    out, thesis = tmp_path / "o", tmp_path / "thesis.txt"
    parts = ("not made by reattend", "choose another --out")
    if kind == "file":
        out.write_text("mine")
    elif kind == "below a file":
        thesis.write_text("mine")
        out, parts = thesis / "o", ("is a file", "another --out")
    elif kind == "named partial":
        out, parts = tmp_path / "x.partial", ("*.partial", "")
    else:
        taken = out if kind == "folder" else tmp_path / "o.partial"
        taken.mkdir()
        (taken / "thesis.txt").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    result = reattend("convert", tiny_path, "--data", tiny_text, "--out", out, "--overwrite")
    refused(result, EXIT_BAD_INPUT, *parts)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_read_only_place(
    tiny_path: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o500)
    if os.access(place, os.W_OK):  # root may write everywhere: ask as another user would
        allowed = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != place and allowed(p, mode))
    result = reattend("convert", tiny_path, "--data", tiny_text, "--out", place / "out")
    place.chmod(0o700)
    refused(result, EXIT_BAD_INPUT, "not writable", "another --out", str(place))
    assert list(place.iterdir()) == []


def test_a_folder_that_turns_read_only(
    tiny_path: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if str(target).endswith("report.json"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    refused(reattend(*command), EXIT_BAD_INPUT, "not writable", "report.json")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from reattend.cli import main
main()
"""


@pytest.mark.parametrize("limit", [3000, 30_000])
def test_a_full_disk_then_room_again(
    limit: int, tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """The system refuses to write past a size: at the statistics, then at the weights."""
    command = ["convert", tiny_path, "--data", tiny_text, "--out", tmp_path / "out", *FAST]
    told = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, command)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == EXIT_BAD_INPUT, told.stderr
    assert "disk of the output folder is full" in told.stderr
    assert "continues where it stopped" in told.stderr
    assert "Traceback" not in told.stderr + told.stdout
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert reattend(*command).exit_code == 0
    assert (tmp_path / "out" / "report.json").is_file()


# Missing packages and exports


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


# A few through the real program


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
