"""The output folder protocol: claims, stages, names, and clear refusals."""

import errno
import os

import pytest
from workdir_runs import PRINT, small_run, tree

from reattend.errors import EXIT_BAD_INPUT, OutputError
from reattend.workdir import Workdir, digest


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


def test_a_stage_that_other_versions_finished_is_not_reused(tmp_path):
    for version, reused in (("1", False), ("1", True), ("2", False)):
        with Workdir.open(tmp_path / "out", PRINT | {"reattend": version}) as work:
            assert work.has("a", "1") is reused
            work.publish_bytes("a.bin", b"a")
            work.mark("a", "1")


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
