"""A run that dies at any point of its folder resumes to the same bytes."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from workdir_runs import PRINT, small_run, tree

from reattend.errors import OutputError
from reattend.workdir import Workdir


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_fault_between_the_two_renames_brings_the_old_result_back(tmp_path, monkeypatch, fault):
    out = tmp_path / "out"
    small_run(out)
    old = tree(out)
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise fault
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("reattend.workdir.os.rename", failing)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            small_run(out, PRINT | {"plan": "q"}, overwrite=True)
    assert out.exists() == isinstance(fault, OSError)
    assert small_run(out) == "complete"
    assert tree(out) == old
    assert small_run(out, PRINT | {"plan": "q"}, overwrite=True) == "resumed"
    assert tree(out)["solve.bin"] == b"q" * 50
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


SCRIPT = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from reattend.workdir import Workdir, digest

    out, die_at, mode, pause = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    points = 0

    def at(self, phase, name):
        global points
        points += 1
        print(phase, name, flush=True)
        if points == die_at:
            os._exit(9)
        time.sleep(pause)

    Workdir._at = at
    prints = {"weights": "w", "plan": "new"}
    with Workdir.open(out, prints, overwrite=mode == "overwrite") as work:
        if work.state != "complete":
            for stage in ("stats", "solve"):
                if not work.has(stage, digest(stage)):
                    work.publish_bytes(f"work/{stage}.bin", stage.encode() * 999)
                    work.publish_bytes(f"{stage}.bin", stage.encode() * 999)
                    work.mark(stage, digest(stage))
            def save(folder):
                (folder / "config.json").write_bytes(b"{}")
                (folder / "model.bin").write_bytes(b"m" * 999)
            work.publish_folder(save)
            work.finish()
    """
)


def run_script(out, die_at=0, mode="plain", pause=0.0):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), str(die_at), mode, str(pause)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("mode", ["plain", "overwrite"])
def test_dying_at_any_point_resumes_to_the_same_bytes(tmp_path, mode):
    reference = tmp_path / "reference"
    whole = run_script(reference)
    assert whole.returncode == 0, whole.stderr
    expected = tree(reference)
    # Every publish has two points, before and after its rename, and finish has one or two more.
    points = len(whole.stdout.splitlines()) + (mode == "overwrite")
    assert points >= 21
    for die_at in range(1, points + 1):
        folder = tmp_path / f"{mode}-{die_at}"
        out = folder / "out"
        if mode == "overwrite":
            small_run(out)
        died = run_script(out, die_at, mode)
        assert died.returncode == 9, (die_at, died.stderr)
        results = [f for f in folder.iterdir() if (f / "solve.bin").exists()]
        assert mode == "plain" or results, f"nothing was left at point {die_at}"
        again = run_script(out, 0, mode)
        assert again.returncode == 0, (die_at, again.stderr)
        assert tree(out) == expected, die_at
        assert [p.name for p in folder.iterdir()] == ["out"], die_at


def test_a_real_kill_releases_the_folder(tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), "0", "plain", "0.2"],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(8):
        child.stdout.readline()
    with pytest.raises(OutputError, match="another process"):
        Workdir.open(out, PRINT)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    start = time.monotonic()
    again = run_script(out)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - start < 30
    run_script(tmp_path / "reference")
    assert tree(out) == tree(tmp_path / "reference")
