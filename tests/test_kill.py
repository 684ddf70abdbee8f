"""Killed anywhere, a run resumes to the same bytes; Ctrl-C ends it cleanly."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny

from reattend.errors import EXIT_INTERRUPTED

HARNESS = Path(__file__).with_name("kill_harness.py")
PLAN: dict[str, Any] = {
    "version": 1,
    "rules": [
        {"layers": [0], "to": "mla", "kv_keep": 0.5},
        {"layers": [1], "to": "moh", "route": "head", "shared": 0, "top_k": 3},
    ],
    "calibrate": {"seq_len": 64, "statistics_tokens": 1024},
}
GATES: dict[str, Any] = {
    **PLAN,
    "rules": [
        {
            "sites": "*", "to": "sparse", "finder": "gate", "steps": 6,
            "pattern": {"select": {"kind": "gate", "block": 4, "gate_dim": 4, "topk": 2}},
        },
    ],
}  # fmt: skip
TRAINS = {**PLAN, "calibrate": {**PLAN["calibrate"], "tokens": 1200, "batch_size": 4}}
LINEAR: dict[str, Any] = {
    **TRAINS,
    "rules": [{"sites": "*", "to": "linear", "linear_share": 0.5, "window": 8}],
    "calibrate": {**TRAINS["calibrate"], "stages": ["layerwise"]},
}
#: blocks that read one another
TIED: dict[str, Any] = {
    **TRAINS,
    "rules": [
        {"layers": [0, 1, 2], "to": "echo", "followers": 1},
        {"layers": [3, 4], "to": "masa", "atoms": 1},
    ],
    "calibrate": {**TRAINS["calibrate"], "stages": ["end-to-end"]},
}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but run.json, which holds times."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "run.json"
    }


def differing(one: Path, two: Path) -> list[str]:
    a, b = tree(one), tree(two)
    return sorted(n for n in {*a, *b} if a.get(n) != b.get(n))


def harness(
    folder: Path, model: Path, text: Path, plan: dict[str, Any], do: list[str]
) -> dict[str, Any]:
    request = {
        "folder": str(folder), "model": str(model), "data": str(text), "plan": plan, "do": do,
        "seed": random.SystemRandom().randrange(10_000),
    }  # fmt: skip
    file = folder / "request.json"
    file.write_text(json.dumps(request))
    run = subprocess.run([sys.executable, HARNESS, file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {**answer, "seed": request["seed"]}


@pytest.mark.slow
def test_killed_at_every_point_and_at_random(
    tmp_path: Path, tiny_path: Path, tiny_text: Path
) -> None:
    """One output killed at each point in turn, one by three real kill -9; a plain run twice."""
    told = harness(tmp_path, tiny_path, tiny_text, PLAN, ["chain", "random"])
    published = {p.split(" ", 1)[1] for p in told["points"] if p.startswith("published ")}
    assert {"model.safetensors", "report.json", "report.html", "run.json"} <= published
    assert {f"work/statistics/{i}.safetensors" for i in (0, 1)} <= published
    assert told["killed"] >= len(set(told["points"])) - 1  # the first fingerprint and the last
    whole = tmp_path / "whole"
    for name in ("again", "chain", "random"):
        assert differing(tmp_path / name, whole) == [], (name, told["seed"], told.get("times"))
    left = {p.name for p in tmp_path.iterdir() if p.is_dir()}
    assert left == {"whole", "again", "chain", "random"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_once_at_each_point(tmp_path: Path, tiny_path: Path, tiny_text: Path) -> None:
    told = harness(tmp_path, tiny_path, tiny_text, PLAN, ["each"])
    for number in range(1, len(told["points"]) + 1):
        name = f"each-{number}"
        assert differing(tmp_path / name, tmp_path / "whole") == [], told["points"][number - 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_it_trains(tmp_path: Path, tiny_path: Path, tiny_text: Path) -> None:
    told = harness(tmp_path, tiny_path, tiny_text, TRAINS, ["chain", "random"])
    assert any("work/calibrate/end-to-end" in p for p in told["points"])
    for name in ("again", "chain", "random"):
        assert differing(tmp_path / name, tmp_path / "whole") == [], (name, told)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_where_one_of_two_layers_becomes_linear(
    tmp_path: Path, tiny_path: Path, tiny_text: Path
) -> None:
    """Which one is kept by the killed run, and so are its trained feature maps."""
    told = harness(tmp_path, tiny_path, tiny_text, LINEAR, ["chain"])
    assert any("work/chosen.json" in p for p in told["points"])
    assert any("work/calibrate/layerwise" in p for p in told["points"])
    assert told["killed"] >= len(set(told["points"])) - 1
    assert differing(tmp_path / "chain", tmp_path / "whole") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_where_blocks_read_one_another(tmp_path: Path, tiny_text: Path) -> None:
    """Who follows whom is kept; atoms are built and trained once for all."""
    model = save_tiny(tmp_path / "model", num_hidden_layers=5)
    told = harness(tmp_path, model, tiny_text, TIED, ["chain"])
    assert any("work/chosen.json" in p for p in told["points"])
    assert any("work/calibrate/end-to-end" in p for p in told["points"])
    assert told["killed"] >= len(set(told["points"])) - 1
    assert differing(tmp_path / "chain", tmp_path / "whole") == []


@pytest.mark.slow
def test_killed_while_gates_learn(tmp_path: Path, tiny_path: Path, tiny_text: Path) -> None:
    """They learn again from the rows that the killed run left."""
    harness(tmp_path, tiny_path, tiny_text, GATES, ["gates"])
    assert differing(tmp_path / "gates", tmp_path / "whole") == []
    stages = {
        s["name"]: s["reused"]
        for s in json.loads((tmp_path / "gates" / "run.json").read_text())["stages"]
    }
    assert stages["statistics"] is True
    assert stages["rewrite"] is False


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path, tiny_path: Path, tiny_text: Path) -> None:
    """A real SIGINT after the statistics: exit 6, a hint, and the next run reuses them."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(json.dumps(PLAN))
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "reattend", "convert", tiny_path, "--plan", plan,
        "--data", tiny_text, "--out", out,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    mark = tmp_path / "out.partial" / "work" / "stages" / "statistics.json"
    deadline = time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERRUPTED, told
    assert "interrupted" in told
    assert "continues where it stopped" in told
    assert "Traceback" not in told
    assert not out.exists()
    assert not list(tmp_path.rglob("*.tmp"))
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["totals"]["converted"] == 2
    stages = {s["name"]: s for s in json.loads((out / "run.json").read_text())["stages"]}
    assert stages["statistics"]["reused"] is True
    assert stages["verify"]["reused"] is False
    assert not (tmp_path / "out.partial").exists()
