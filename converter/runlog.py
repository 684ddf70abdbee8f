"""Times and measured memory of a run: what goes to `run.json` and nowhere else."""

from __future__ import annotations

import platform
import re
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from reattend.processes import count
from reattend.report import Run
from reattend.report.run import StageRun
from reattend.source import Source


class RunLog:
    """Collects stages as they finish.

    Attributes:
        baseline: peak memory before the first stage, bytes: the interpreter and its packages.
        predicted: by stage, predicted growth of peak memory over `baseline`, bytes.
    """

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.stages: list[StageRun] = []
        self.baseline = peak_memory()
        self.predicted: dict[str, int] = {}
        self._reused: set[str] = set()

    def reused(self, *names: str) -> None:
        """Note that these stages' results were taken from an interrupted run."""
        self._reused.update(names)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage; peak memory is the process's high-water mark at its end, in bytes."""
        begin = time.monotonic()
        yield
        seconds = time.monotonic() - begin
        self.stages.append(StageRun(name=name, seconds=seconds, peak_bytes=peak_memory()))

    def finish(self, source: Source, out: Path | None) -> Run:
        """The record so far."""
        paths = {} if source.folder is None else {"model": str(source.folder)}
        if out is not None:
            paths["out"] = str(out)
        return Run(
            started=self.started.isoformat(timespec="seconds"),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            platform=platform.platform(),
            device=str(source.device),
            threads=torch.get_num_threads(),
            processes=count(),
            command=tuple(sys.argv),
            paths=paths,
            stages=tuple(self._completed(s) for s in self.stages),
        )

    def _completed(self, stage: StageRun) -> StageRun:
        known: dict[str, object] = {"reused": stage.name in self._reused}
        growth = self.predicted.get(stage.name)
        if growth is not None:
            known["peak_bytes_predicted"] = self.baseline + growth
        return stage.model_copy(update=known)


def peak_memory() -> int:
    """High-water mark of this process's resident memory, bytes.

    On Linux read from /proc: `ru_maxrss` of a child begins at what its parent held when it was
    started.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
