"""Output folders that cannot be used: taken, read-only, full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_calls import FAST, reattend, refused

from reattend.errors import (
    EXIT_BAD_INPUT,
)


@pytest.mark.parametrize(
    "kind", ["file", "folder", "partial", "below a file", "named partial", "link", "long"]
)
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
    elif kind == "link":
        out.symlink_to(tmp_path / "nowhere")
    elif kind == "long":
        out, parts = tmp_path / ("x" * 300), ("cannot be written", "another --out")
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


@pytest.mark.daily
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
