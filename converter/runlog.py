"""Times and measured memory of a run: what goes to `run.json` and nowhere else."""

from __future__ import annotations

import platform
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from reattend.memory import forget_peak, give_back, peak_memory
from reattend.processes import count
from reattend.report import Run
from reattend.report.run import StageRun
from reattend.source import Source


class RunLog:
    """Collects stages as they finish.

    Attributes:
        baseline: memory before the first stage, bytes: the interpreter and its packages.
        predicted: by stage, predicted peak memory over `baseline`, bytes.
    """

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.stages: list[StageRun] = []
        self.baseline = peak_memory()
        self.predicted: dict[str, int] = {}
        self._reused: set[str] = set()
        self._alone = True  # every stage's peak is its own
        self._held: int | None = None  # resident memory after the last tidying, bytes

    def begin(self) -> None:
        """Take what the process holds now as the baseline."""
        self._held = give_back()
        forget_peak()
        self.baseline = peak_memory()

    def reused(self, *names: str) -> None:
        """Note that these stages' results were taken from an interrupted run."""
        self._reused.update(names)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage and measure its peak memory, in bytes.

        What earlier stages freed is returned to the system first. Where the high-water mark of
        the process cannot be reset, a stage shows the highest point up to its end.
        """
        self._held = give_back(self._held)
        self._alone = forget_peak() and self._alone
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
            baseline_bytes=self.baseline,
            stages=self._completed(),
        )

    def _completed(self) -> tuple[StageRun, ...]:
        """The stages with what was predicted for them and whether they were reused."""
        highest, done = 0, []
        for stage in self.stages:
            known: dict[str, object] = {"reused": stage.name in self._reused}
            growth = self.predicted.get(stage.name)
            if growth is not None:
                highest = max(highest, growth)
                known["peak_bytes_predicted"] = self.baseline + (growth if self._alone else highest)
            done.append(stage.model_copy(update=known))
        return tuple(done)
