"""The durable write: all or nothing, also when the disk is really full."""

import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from reattend.durable import durable_write, os_errors_explained, tensors_writer
from reattend.errors import OutputError


def nothing():
    pass


def test_it_replaces_the_old_content_only_at_the_end(tmp_path):
    path = tmp_path / "sub" / "a.txt"
    durable_write(path, lambda p: p.write_text("old") and None, nothing)
    seen = []
    durable_write(
        path, lambda p: p.write_text("new") and None, lambda: seen.append(path.read_text())
    )
    assert (seen, path.read_text()) == (["old"], "new")
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("writer"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def writer(p):
        p.write_text("half")
        raise error

    with pytest.raises(type(error)):
        durable_write(path, writer, nothing)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@contextmanager
def small_files_only():
    """The system's own limit: writing past it fails inside write(2), as a full disk does.

    Not a fixture: what pytest itself writes to a log would fail too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_the_system_refuses_is_a_full_disk(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(OutputError, match=r"full[\s\S]*continues"), small_files_only():
        durable_write(path, lambda p: p.write_bytes(b"x" * 100_000) and None, nothing)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_inside_safetensors_is_explained_too(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from safetensors import SafetensorError

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match="full"):
        durable_write(tmp_path / "a", tensors_writer({"x": torch.zeros(2)}), nothing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EACCES, "not writable"),
        (errno.EROFS, "not writable"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_system_errors_have_words(tmp_path, code, message):
    with pytest.raises(OutputError, match=message) as caught, os_errors_explained(tmp_path):
        raise OSError(code, os.strerror(code))
    assert os.strerror(code) in str(caught.value)


@pytest.mark.smoke
def test_tensors_are_the_same_bytes_whatever_their_order_or_process(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path; from reattend.durable import tensors_writer\n"
        "t = {'b': torch.arange(6.).view(2, 3).T, 'a': torch.ones(3, dtype=torch.bfloat16)}\n"
        "order = sorted(t, reverse=sys.argv[2] == '1')\n"
        "tensors_writer({k: t[k] for k in order})(Path(sys.argv[1]))\n"
    )
    files = [tmp_path / name for name in ("x", "y")]
    for index, file in enumerate(files):
        command = [sys.executable, "-c", code, str(file), str(index)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": str(index)})
    assert files[0].read_bytes() == files[1].read_bytes()
    from safetensors.torch import load_file

    loaded = load_file(files[0])
    assert loaded["b"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
