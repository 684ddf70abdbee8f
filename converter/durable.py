"""The one durable write: a file is there in full under its name, or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reattend.errors import OutputError
from reattend.interrupts import interrupts_wait

if TYPE_CHECKING:
    from torch import Tensor

Writer = Callable[[Path], None]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def os_errors_explained(where: Path) -> Iterator[None]:
    """Turn `OSError` inside the block into an `OutputError` about `where`.

    Errors of safetensors count too: its Rust side reports the system's as text.

    Raises:
        OutputError: with the system's reason; full disks and missing permission say what to do.
    """
    try:
        yield
    except Exception as error:
        system = _system_error(error)
        if system is None:
            raise
        what, step = "the output cannot be written", "choose another --out"
        if system.errno in _FULL:
            what = "the disk of the output folder is full"
            step = "free some space and run the same command again: it continues where it stopped"
        elif system.errno in _CLOSED:
            what = "the output folder is not writable"
            step = "choose another --out, or change its permissions"
        why = system.strerror or str(system)
        raise OutputError(what, where=str(where), why=why, next_step=step) from error


def _system_error(error: Exception) -> OSError | None:
    """The system's error in this one: itself, or "... (os error 28)" from safetensors."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"os error (\d+)", str(error))
    if code is None or type(error).__name__ != "SafetensorError":
        return None
    number = int(code[1])
    return OSError(number, os.strerror(number))


def temporary_of(path: Path) -> Path:
    """The name under which `path` is written before it is complete."""
    return path.with_name(f".{path.name}.tmp")


def durable_write(path: Path, writer: Writer, before_replace: Callable[[], None]) -> None:
    """Let `writer` fill a temporary file beside `path`, sync it to disk, then rename it.

    Args:
        path: the file to create or replace; its folder is made if missing.
        writer: writes the whole content to the path it is given.
        before_replace: called when the temporary file is complete and synced.

    Ctrl-C waits until the file is in place.

    Raises:
        OutputError: the disk is full or not writable. Whatever is raised, the temporary file is
            removed and what `path` held before is still there.
    """
    temporary = temporary_of(path)
    with os_errors_explained(path), interrupts_wait():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer(temporary)
            _sync(temporary)
            before_replace()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        _sync(path.parent)


def tensors_writer(tensors: Mapping[str, Tensor]) -> Writer:
    """A writer of one safetensors file; the same tensors always give the same bytes.

    The metadata is `{"format": "pt"}` alone: safetensors keeps it in a hash map, so the order of
    two keys would differ from run to run.
    """

    def write(path: Path) -> None:
        from safetensors.torch import save_file

        plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
        save_file(plain, str(path), metadata={"format": "pt"})

    return write


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
