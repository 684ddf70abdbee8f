"""The command line where nothing is wrong, and how it behaves as a program."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reattend import cli_guard
from reattend.cli import app
from reattend.errors import (
    EXIT_BAD_INPUT,
    EXIT_GATE,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    OutputError,
)
from reattend.plans import preset_names, preset_text

FAST = ["--set", "calibrate.seq_len=64", "--set", "calibrate.statistics_tokens=512"]


def reattend(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments: Any) -> str:
    result = reattend(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    text: str = result.stdout
    return text


@pytest.fixture(scope="module")
def converted(tiny_path: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    log = out.with_name("log.jsonl")
    told = good("convert", tiny_path, "--data", tiny_text, "--out", out, "--log-json", log, *FAST)
    assert "Every one of the 2 attention sites was converted to mla" in told
    assert str(out / "report.html") in told
    return out


def test_help_is_grouped_shows_examples_and_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['reattend', '--help']\n"
        "from reattend.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy"
    )
    begin = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    for part in ("Look, change nothing", "Work with a result", "Examples", "Exit codes", "--out"):
        assert part in told.stdout
    assert time.monotonic() - begin < 10  # seconds; 0.7 on an idle machine


@pytest.mark.parametrize("command", ["find", "plans", "convert", "verify", "export", "report"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage:" in good(command, "--help")


def test_find(tiny_path: Path) -> None:
    told = good("find", tiny_path)
    assert "model.layers.1.self_attn" in told
    for part in ("4/2×8", "causal", "rope 8", "✓", "2 found, 0 not understood"):
        assert part in told
    data = json.loads(good("find", tiny_path, "--json"))
    assert [s["path"] for s in data["sites"]] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert all(s["verified"] and s["error"] <= 1e-12 and not s["deferred"] for s in data["sites"])
    assert data["sites"][0]["spec"]["kv_heads"] == 2
    assert data["sites"][0]["parameters"] == 32 * 32 * 2 + 2 * 32 * 16
    assert data["refused"] == []


def test_find_tells_the_long_story_of_a_block(tiny_path: Path) -> None:
    told = good("find", tiny_path, "--why", "model.layers.1.self_attn")
    for part in ("found and proven", "q_proj.weight (4 x 8) > rotary 8 (half)", "[B 4 N 8]"):
        assert part in told
    data = json.loads(good("find", tiny_path, "--json", "--why", "model.layers.1.self_attn"))
    assert data["numbers"]["error"] <= 1e-12
    assert data["numbers"]["first"] is None
    assert [r["call"] for r in data["rows"]].count("attention") == 1
    result = reattend("find", tiny_path, "--why", "model.layers.3.self_attn")
    assert result.exit_code == EXIT_BAD_INPUT
    assert "did you mean 'model.layers." in result.stderr


def test_find_reads_a_config_where_there_are_no_weights(tiny_path: Path, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    shutil.copy(tiny_path / "config.json", tmp_path / "config")
    for arguments in ((tmp_path / "config",), (tiny_path, "--meta")):
        told = good("find", *arguments)
        assert told.count("deferred") == 3
        assert "its proof waits" in told
        data = json.loads(good("find", *arguments, "--json"))
        assert [s["verified"] for s in data["sites"]] == [False, False]
        assert all("meta device" in s["deferred"] and s["error"] is None for s in data["sites"])
    told = good("find", tiny_path, "--meta", "--why", "model.layers.0.self_attn")
    assert "not proven yet" in told


def test_find_where_there_is_none(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    result = reattend("find", tmp_path / "mamba")
    assert result.exit_code == EXIT_REFUSED
    assert "no attention block was found" in result.stderr
    assert "next: a model without attention" in result.stderr


def test_plans(tmp_path: Path) -> None:
    listed = good("plans", "list")
    assert set(json.loads(good("plans", "list", "--json"))) == set(preset_names())
    for name in preset_names():
        assert name in listed
        assert good("plans", "show", name) == preset_text(name)
        mine = tmp_path / f"{name}.yaml"
        mine.write_text(good("plans", "show", name))
        assert "a valid plan" in good("plans", "check", mine)
    assert json.loads(good("plans", "check", mine, "--json"))["version"] == 1


def test_options_of_plans_are_explained() -> None:
    told = good("plans", "options")
    for part in ("to: mla: keys and values", "to: prune-heads", "calibrate: ", "max_ppl_increase"):
        assert part in told
    assert "not for plans" not in told
    every = json.loads(good("plans", "options", "--json"))
    assert [row for rows in every.values() for row in rows if not row["meaning"]] == []
    assert [row["key"] for row in every["echo"]] == ["followers"]
    options = {row["key"]: row for row in every["mla"]}
    assert options["kv_keep"]["takes"].startswith("a number > 0 and <= 1")
    assert options["latent_norm"]["takes"].startswith("none or rms")
    assert options["latent_norm"]["default"] == "none"
    assert options["balance"]["default"] == "1.0"
    inner = json.loads(good("plans", "options", "sparse", "--json"))
    assert [
        (n, row["key"]) for n, rows in inner.items() for row in rows if not row["meaning"]
    ] == []
    gate = {row["key"]: row["takes"] for row in inner["sparse.pattern.select.gate"]}
    assert gate["ratio"] == "a number > 0.0 and <= 1.0 or null"
    assert "layer" not in [row["key"] for row in inner["sparse.pattern.select.recorded"]]
    same = [
        json.loads(good("plans", "options", n, "--json")) for n in ("profile", "sparse.profile")
    ]
    assert same[0] == same[1] == {"sparse.profile": inner["sparse.profile"]}
    assert list(json.loads(good("plans", "options", "sparse.candidates", "--json")))
    result = reattend("plans", "options", "mlla")
    assert result.exit_code == EXIT_BAD_INPUT
    assert "did you mean 'mla'?" in result.stderr


@pytest.mark.slow
def test_convert_logs_events_and_is_quiet_where_nobody_looks(
    converted: Path, tiny_path: Path, tiny_text: Path
) -> None:
    events = [json.loads(line) for line in (converted.parent / "log.jsonl").open()]
    stages = list(dict.fromkeys(e["stage"] for e in events))
    assert stages[:2] == ["open", "find"]
    assert {"statistics", "rewrite", "verify", "publish", "done"} <= set(stages)
    seconds = [e["seconds"] for e in events]
    assert seconds == sorted(seconds)
    command = ("convert", tiny_path, "--data", tiny_text, "--out", converted, *FAST)
    report = json.loads((converted / "report.json").read_text())
    for spelling in (["--json"], ["--log-json", "--json"], ["--json", "--log-json"]):
        told = reattend(*command, *spelling)
        assert told.exit_code == 0
        assert json.loads(told.stdout) == report
        lines = [json.loads(line) for line in told.stderr.splitlines()]
        assert [e["stage"] for e in lines][:1] == (["open"] if "--log-json" in spelling else [])


def test_dry_run_says_what_the_run_does(
    converted: Path, tiny_path: Path, tiny_text: Path, tmp_path: Path
) -> None:
    command = ("convert", tiny_path, "--data", tiny_text, "--dry-run", *FAST)
    told = json.loads(good(*command, "--json"))
    totals = json.loads((converted / "report.json").read_text())["totals"]
    before = sum(s["cache_bytes_before"] for s in told["sites"])
    after = sum(s["cache_bytes_after"] for s in told["sites"])
    assert before == totals["cache_bytes_per_token_before"]
    assert after == totals["cache_bytes_per_token_after"]
    # The preset chooses sizes from statistics; what is told is an even split of the same cache.
    assert told["parameters_after"] == pytest.approx(totals["parameters_after"], rel=0.2)
    assert told["parameters_after"] != told["parameters_before"]
    assert 0 < max(s["peak_bytes"] for s in told["sites"]) < told["peak_bytes"]
    assert 0 < sum(s["seconds"] for s in told["sites"]) < told["seconds"]
    text = good(*command, "--out", tmp_path / "out")
    for part in ("mla (kv_lora_rank", "Cache B/token", "Parameters", "Peak memory", "statistics"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dry_run_lists_refusals_and_then_refuses(tiny_path: Path) -> None:
    settings = ["--set", "kv_keep=null", "--set", "kv_lora_rank=4000"]
    result = reattend("convert", tiny_path, "--dry-run", *settings)
    assert result.exit_code == EXIT_REFUSED
    assert result.stdout.count("refused: kv_lora_rank 4000 is larger than possible") == 2
    assert "to: keep}" in result.stderr
    kept = good(
        "convert", tiny_path, "--plan", "transmla", "--dry-run", "--set", "rules.0.layers=[0]"
    )
    assert "unmatched: no rule of the plan matches" in kept


def test_report(converted: Path) -> None:
    told = good("report", converted)
    assert "The cache shrinks to 50.0 %" in told
    assert str(converted / "report.html") in told
    assert good("report", converted, "--json") == (converted / "report.json").read_text()


def test_verify(converted: Path, tiny_path: Path, tmp_path: Path) -> None:
    told = good("verify", converted, "--original", tiny_path)
    for part in ("complete", "2, as the report says", "cached decode, batch 3", "error of model"):
        assert part in told
    copy = Path(shutil.copytree(tiny_path, tmp_path / "other"))
    (copy / "model.safetensors").unlink()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.model.norm.weight.data.mul_(1.001)
    model.save_pretrained(copy)
    result = reattend("verify", converted, "--original", copy, "--json")
    assert result.exit_code == EXIT_GATE
    failed = [f["name"] for f in json.loads(result.stdout) if f["verdict"] == "fail"]
    assert failed == ["original"]


def test_export_runs_in_onnx_runtime(converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    told = good("export", converted, "--target", "onnx", "--out", tmp_path / "onnx")
    assert "relative difference from torch" in told
    assert (tmp_path / "onnx" / "model.onnx").is_file()


def ended(error: BaseException) -> Any:
    """Run a command that raises `error`."""
    alone = typer.Typer()

    @alone.command()
    @cli_guard.guarded
    def command() -> None:
        raise error

    return CliRunner().invoke(alone, [])


def test_an_error_of_ours_is_told_in_one_line_with_a_hint() -> None:
    result = ended(RuntimeError("[red]odd[/red]\nand more"))
    assert result.exit_code == EXIT_INTERNAL
    assert "RuntimeError: [red]odd[/red]" in result.stderr
    assert "reattend --debug" in result.stderr
    assert "and more" not in result.stderr


def test_memory_has_its_own_hint() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 TB")):
        result = ended(error)
        assert result.exit_code == EXIT_INTERNAL
        assert "not enough memory" in result.stderr
        assert "--dry-run" in result.stderr


def test_markup_in_errors_stays_text_and_lines_stay_whole() -> None:
    path = "/models/[bold]x[/bold]" + "y" * 300
    result = ended(OutputError("full", where=path))
    assert result.exit_code == 2
    assert path in result.stderr


def test_a_path_that_the_system_refuses_is_the_users(tiny_path: Path) -> None:
    for arguments in (["find", "x" * 300], ["convert", tiny_path, "--plan", "y" * 300]):
        result = reattend(*arguments, *(["--dry-run"] if arguments[0] == "convert" else []))
        assert result.exit_code == EXIT_BAD_INPUT
        assert "cannot be used" in result.stderr
        assert "File name too long" in result.stderr


def test_an_interrupt_is_6() -> None:
    result = ended(KeyboardInterrupt())
    assert result.exit_code == EXIT_INTERRUPTED
    assert "interrupted" in result.stderr


def test_debug_lets_the_traceback_through(tiny_path: Path) -> None:
    result = reattend("--debug", "find", tiny_path / "none" / "at" / "all")
    assert type(result.exception).__name__ == "ModelError"


def test_a_closed_pipe_is_no_error_of_ours() -> None:
    command = f"{sys.executable} -m reattend plans show transmla | head -c 1"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert told.stdout == "#"
    assert "Traceback" not in told.stderr
    assert "error" not in told.stderr
