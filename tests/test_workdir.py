"""The output folder protocol: claims, stages, kills at every point, and clear refusals."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from reattend.errors import EXIT_BAD_INPUT, OutputError
from reattend.workdir import Workdir, digest

PRINT = {"weights": "w", "plan": "p"}


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def small_run(out, fingerprint=PRINT, overwrite=False, ran=None):
    """Three stages, one of which depends on the plan; returns the state it started from."""
    with Workdir.open(out, fingerprint, overwrite) as work:
        if work.state == "complete":
            return work.state
        start = work.state
        for stage, needs in (("stats", "weights"), ("solve", "plan")):
            inputs = digest([stage, fingerprint[needs]])
            if not work.has(stage, inputs):
                if ran is not None:
                    ran.append(stage)
                work.publish_json(f"work/{stage}.json", {"of": fingerprint[needs]})
                work.publish_bytes(f"{stage}.bin", fingerprint[needs].encode() * 50)
                work.mark(stage, inputs)
        work.publish_bytes("run.json", b"{}")
        work.finish()
        return start


def test_a_run_leaves_exactly_its_results(tmp_path):
    out = tmp_path / "deep" / "out"
    assert small_run(out) == "new"
    assert set(tree(out)) == {"fingerprint.json", "stats.bin", "solve.bin", "run.json"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_the_same_run_twice_gives_the_same_bytes(tmp_path):
    small_run(tmp_path / "a")
    small_run(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_complete_result_is_recognised_and_left_alone(tmp_path):
    out = tmp_path / "out"
    small_run(out)
    before = out.stat().st_mtime_ns
    ran = []
    assert small_run(out, ran=ran) == "complete"
    assert small_run(out, overwrite=True, ran=ran) == "complete"
    assert ran == []
    assert out.stat().st_mtime_ns == before
    with pytest.raises(RuntimeError, match="complete"):
        Workdir.open(out, PRINT).publish_bytes("x", b"")


def test_another_fingerprint_needs_overwrite(tmp_path):
    out = tmp_path / "out"
    small_run(out)
    with pytest.raises(OutputError, match=r"another plan[\s\S]*--overwrite") as caught:
        small_run(out, PRINT | {"plan": "q"})
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert small_run(out, PRINT | {"plan": "q"}, overwrite=True) == "new"
    assert tree(out)["solve.bin"] == b"q" * 50
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_damaged_result_is_not_complete(tmp_path):
    out = tmp_path / "out"
    small_run(out)
    (out / "solve.bin").write_bytes(b"q" * 50)  # the size is right
    with pytest.raises(OutputError, match=r"damaged: solve.bin"):
        small_run(out)
    assert small_run(out, overwrite=True) == "new"
    assert tree(out)["solve.bin"] == b"p" * 50


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_replaced(tmp_path, overwrite):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    odd = tmp_path / "odd.partial"
    odd.mkdir()
    (odd / "note").write_text("x")
    for out in (folder, file, tmp_path / "odd"):
        with pytest.raises(OutputError, match="not made by reattend"):
            small_run(out, overwrite=overwrite)
    with pytest.raises(OutputError, match=r"\*\.partial"):
        small_run(tmp_path / "new.partial")
    assert tree(tmp_path) == {
        "theirs/thesis.txt": b"years of work",
        "file": b"x",
        "odd.partial/note": b"x",
    }


def test_an_empty_folder_may_be_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert small_run(out) == "new"
    assert "solve.bin" in tree(out)


def test_a_partial_of_another_plan_keeps_only_equal_stages(tmp_path):
    out = tmp_path / "out"
    with Workdir.open(out, PRINT) as work:
        for stage, needs in (("stats", "weights"), ("solve", "plan")):
            work.publish_bytes(f"{stage}.bin", PRINT[needs].encode() * 50)
            work.publish_bytes(f"work/{stage}.json", b"{}")
            work.mark(stage, digest([stage, PRINT[needs]]))
        work.publish_bytes("only-in-the-first-plan.bin", b"orphan")
    ran = []
    other = PRINT | {"plan": "q"}
    assert small_run(out, other, ran=ran) == "resumed"
    assert ran == ["solve"]
    small_run(tmp_path / "fresh", other)
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_dropped_stage_loses_its_files(tmp_path):
    with Workdir.open(tmp_path / "out", PRINT) as work:
        work.publish_bytes("a.bin", b"a")
        work.mark("a", "1")
    with Workdir.open(tmp_path / "out", PRINT) as work:
        assert not work.has("a", "2")
        assert not work.path("a.bin").exists()
        assert not work.has("a", "1")


def test_a_stage_whose_file_is_gone_is_not_reused(tmp_path):
    with Workdir.open(tmp_path / "out", PRINT) as work:
        work.publish_bytes("a.bin", b"a")
        work.mark("a", "1")
        assert work.has("a", "1")
        work.path("a.bin").unlink()
        assert not work.has("a", "1")


def test_two_runs_on_one_folder_exclude_each_other(tmp_path):
    with (
        Workdir.open(tmp_path / "out", PRINT),
        pytest.raises(OutputError, match="another process"),
    ):
        Workdir.open(tmp_path / "out", PRINT)
    Workdir.open(tmp_path / "out", PRINT).close()


@pytest.mark.parametrize("name", ["", "../x", "/x", "a/../../x", "x.tmp", "."])
def test_names_stay_inside_the_folder(tmp_path, name):
    with Workdir.open(tmp_path / "out", PRINT) as work, pytest.raises(ValueError, match="relative"):
        work.publish_bytes(name, b"")


def test_names_are_normalised_so_finish_keeps_them(tmp_path):
    with Workdir.open(tmp_path / "out", PRINT) as work:
        work.publish_bytes("./a//b.bin", b"x")
        work.finish()
    assert "a/b.bin" in tree(tmp_path / "out")


def test_a_folder_writer_is_published_file_by_file(tmp_path):
    def save(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_bytes(b"b")
        (folder / "a").write_bytes(b"a")

    with Workdir.open(tmp_path / "out", PRINT) as work:
        paths = work.publish_folder(save, "model")
        assert [p.name for p in paths] == ["a", "b"]
        work.finish()
    assert {"model/a", "model/sub/b"} <= set(tree(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.tmp"))


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.EROFS, "not writable"), (errno.EACCES, "not writable"), (errno.ENOSPC, "full")],
)
def test_a_folder_that_cannot_be_made_is_explained(tmp_path, monkeypatch, code, message):
    def refuse(self, *args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OutputError, match=message) as caught:
        Workdir.open(tmp_path / "out", PRINT)
    assert str(tmp_path) in str(caught.value)


def test_a_file_where_the_parent_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        Workdir.open(tmp_path / "file" / "out", PRINT)


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
