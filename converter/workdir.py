"""The output folder: work in `OUT.partial`, rename to `OUT` when everything is there.

    OUT.partial/fingerprint.json   what this run was asked to do
    OUT.partial/work/              statistics, training states, stage records; gone in OUT
    OUT.partial/...                the files of the result

A run that is killed leaves `OUT.partial`; the next run with the same `--out` reuses every stage
whose inputs are equal and drops the others. `OUT` itself is only ever a complete result.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from reattend.durable import Writer, durable_write, os_errors_explained, tensors_writer
from reattend.errors import OutputError
from reattend.interrupts import interrupts_wait
from reattend.outdir import (
    FINGERPRINT,
    State,
    aside_of,
    fingerprint_of,
    foreign,
    inputs_of,
    partial_of,
    read_json,
    recover,
    state_of_out,
)
from reattend.weight_files import hash_file

if TYPE_CHECKING:
    from torch import Tensor

WORK = "work"
VOLATILE = frozenset({"run.json"})
#: parts of a fingerprint that every stage depends on: other code may store, or compute, differently
VERSIONS = ("reattend", "torch", "transformers")


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of plain data; for fingerprints and stage inputs."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Workdir:
    """One run's output folder; made by `Workdir.open`, closed by `finish` or `with`.

    Attributes:
        out: the folder that `finish` creates.
        partial: the folder where the work happens.
        state: `new`; `resumed` (an earlier run left work behind); or `complete` (`out` already
            holds this very result: there is nothing to do, and nothing may be published).
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, str], state: State) -> None:
        self.out, self.state = out, state
        self.partial = partial_of(out)
        self.fingerprint = dict(fingerprint)
        self._kept: set[str] = {FINGERPRINT}
        self._since_mark: list[str] = []
        self._unlock: Callable[[], Any] = lambda: None

    @classmethod
    def open(cls, out: str | Path, fingerprint: Mapping[str, str], overwrite: bool = False) -> Self:
        """Claim the output folder.

        Args:
            out: the folder wanted.
            fingerprint: hashes of all that decides the result (weights, plan, data, seed,
                versions), by name.
            overwrite: whether another complete result of reattend may be replaced, at the end.

        Raises:
            OutputError: `out` is taken by something else, another process works on it, or the
                folder cannot be written.
        """
        out = Path(out).expanduser().absolute()
        with os_errors_explained(out):
            recover(out)
            found = state_of_out(out, fingerprint, overwrite)
            work = cls(out, fingerprint, found)
            if found == "complete":
                shutil.rmtree(out / WORK, ignore_errors=True)
                return work
            work._claim()
        work.publish_json(FINGERPRINT, fingerprint_of(work.fingerprint))
        return work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; what was published stays for the next run."""
        self._unlock()

    def path(self, name: str) -> Path:
        """Where the published file `name` is, for reading."""
        return (self.out if self.state == "complete" else self.partial) / _relative(name)

    def publish(self, name: str, writer: Writer) -> Path:
        """Write one file durably: after a kill it is there in full or not at all.

        Args:
            name: relative path; below `work/` it is gone from the final folder.
            writer: writes the whole content to the path it is given; the same inputs must give
                the same bytes.

        Returns:
            The path of the published file.

        Raises:
            OutputError: the disk is full or not writable; no partial file is left.
        """
        if self.state == "complete":
            raise RuntimeError(f"{self.out} is complete: nothing to publish")
        name = _relative(name)
        path = self.partial / name
        durable_write(path, writer, lambda: self._at("written", name))
        self._kept.add(name)
        self._since_mark.append(name)
        self._at("published", name)
        return path

    def publish_bytes(self, name: str, content: bytes) -> Path:
        """Publish a file of these bytes."""
        return self.publish(name, lambda path: _write(path, content))

    def publish_json(self, name: str, value: Any) -> Path:
        """Publish plain data as JSON: sorted keys, two spaces, no NaN."""
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        return self.publish_bytes(name, (text + "\n").encode())

    def publish_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> Path:
        """Publish tensors as one safetensors file."""
        return self.publish(name, tensors_writer(tensors))

    def publish_folder(self, writer: Writer, prefix: str = "") -> list[Path]:
        """Publish every file that `writer` puts into the folder it is given, one by one.

        For writers that want a folder (`save_pretrained`); `prefix` is the folder to publish to.
        """
        staging = self.partial / ".staging.tmp"
        with os_errors_explained(self.partial):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                writer(staging)
                files = sorted(p for p in staging.rglob("*") if p.is_file())
                return [
                    self.publish(
                        (Path(prefix) / file.relative_to(staging)).as_posix(),
                        lambda path, file=file: os.replace(file, path),  # type: ignore[misc]
                    )
                    for file in files
                ]
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    def has(self, stage: str, inputs_hash: str) -> bool:
        """Whether a stage was finished with these inputs; a record of other inputs is dropped.

        A stage that is reused keeps its files; those of a stage that is dropped are removed. What
        other versions (`VERSIONS`) finished is dropped.
        """
        record = self.partial / _record(stage)
        known = read_json(record)
        if known is None:
            return False
        files = [str(name) for name in known.get("files", [])]
        same = known.get("inputs") == self._asked(inputs_hash)
        if same and all(self.path(f).is_file() for f in files):
            self._kept.update(files, [_record(stage)])
            self._since_mark.clear()
            return True
        with os_errors_explained(record):
            for name in [*files, _record(stage)]:
                if name not in self._kept:
                    self.path(name).unlink(missing_ok=True)
        return False

    def mark(self, stage: str, inputs_hash: str) -> None:
        """Record that a stage is finished; it owns the files published since the last record."""
        files = sorted(set(self._since_mark) - {FINGERPRINT})
        self.publish_json(_record(stage), {"inputs": self._asked(inputs_hash), "files": files})
        self._since_mark.clear()

    def _asked(self, inputs_hash: str) -> str:
        return digest([inputs_hash, [self.fingerprint.get(name) for name in VERSIONS]])

    def finish(self) -> Path:
        """Make the result visible: remove what this run did not want, then rename to `out`.

        An older result is moved aside first and removed last, so at every moment one complete
        result, old or new, is on disk; `open` puts the old one back if a kill fell in between.

        Raises:
            OutputError: the folder cannot be renamed.
        """
        if self.state == "complete":
            return self.out
        with interrupts_wait():
            self._finish()
        return self.out

    def _finish(self) -> None:
        with os_errors_explained(self.out):
            for file in sorted(p for p in self.partial.rglob("*") if p.is_file()):
                if file.relative_to(self.partial).as_posix() not in self._kept:
                    file.unlink()
            _remove_empty(self.partial)
        results = sorted(n for n in self._kept - {FINGERPRINT} if not n.startswith(f"{WORK}/"))
        with os_errors_explained(self.out):
            sums = {n: None if n in VOLATILE else hash_file(self.path(n)) for n in results}
        self.publish_json(FINGERPRINT, fingerprint_of(self.fingerprint, sums))
        with os_errors_explained(self.out):
            aside = aside_of(self.out)
            if self.out.exists() and any(self.out.iterdir()):
                os.rename(self.out, aside)
                self._at("aside", self.out.name)
            try:
                os.rename(self.partial, self.out)
            except OSError:
                recover(self.out)
                raise
            self._at("renamed", self.out.name)
            shutil.rmtree(self.out / WORK, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
        self.state = "complete"
        self.close()

    def _at(self, phase: str, name: str) -> None:
        """Called at every point where a kill could fall; tests replace it to die there."""

    def _claim(self) -> None:
        inside = [p for p in self.partial.rglob("*") if p.is_file()]
        ours = inputs_of(self.partial) is not None
        if not ours and any(not p.name.endswith(".tmp") for p in inside):
            raise foreign(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock()
        for path in list(self.partial.rglob("*.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.state = "resumed" if ours else "new"

    def _lock(self) -> None:
        """Hold the partial folder; the system lets go when the process ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # not POSIX: two runs on one folder are then the user's to avoid
            return
        handle = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise OutputError(
                "another process is working on this output folder",
                where=str(self.partial),
                next_step="wait for it, or choose another --out",
            ) from None
        self._unlock = weakref.finalize(self, os.close, handle)


def _relative(name: str) -> str:
    path = Path(name)
    if not path.name or path.is_absolute() or ".." in path.parts or name.endswith(".tmp"):
        raise ValueError(f"not a relative file name: {name!r}")
    return path.as_posix()


def _record(stage: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", stage):
        raise ValueError(f"not a stage name: {stage!r}")
    return f"{WORK}/stages/{stage}.json"


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _remove_empty(folder: Path) -> None:
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
