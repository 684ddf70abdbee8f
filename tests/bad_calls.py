"""Commands that must fail: how they are called, and what must be left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from reattend.cli import app

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


def written(tmp_path: Path, plan: Any) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    return path


def with_rule(**changes: Any) -> dict[str, Any]:
    rule = {k: v for k, v in {**GOOD["rules"][0], **changes}.items() if v is not None}  # type: ignore[index]
    return {"version": 1, "rules": [rule]}


def cut(share: float) -> Change:
    def edit(model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return edit
