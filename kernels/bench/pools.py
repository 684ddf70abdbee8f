"""Jobs side by side in processes of their own, which end in time.

A process that died, or whose device broke (after one illegal access every later call of a process
fails too), is replaced, and the job it was at is tried once more as the first of a fresh process.
So only a job that fails alone is at fault, and none that came after it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

#: how a failure begins that was for want of time
LATE = "took longer than"
_SPOILED: list[bool] = []
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        value: what the work returned.
        failed: why there is no value; empty where there is one.
        broke: whether its process had to end.
    """

    value: Any = None
    failed: str = ""
    broke: bool = False


def told(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error)[:300]}"


def spoil() -> None:
    """In a worker: let no other job run in this process; the one it is at counts as it ends."""
    _SPOILED.append(True)


def _broken_device() -> str:
    """Why nothing more can run in this process; empty while it can."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:  # whatever it is: the next call would raise it again
        return told(error)
    return ""


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """In a worker: one job after the other, until no more come or the device breaks."""
    pipe.send(None)  # the clock of the first job starts now
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            found = Outcome(work(job))
        except Exception as error:  # one job's failure is its outcome
            found = Outcome(failed=told(error))
        broken = _broken_device()
        if broken or _SPOILED:
            pipe.send(Outcome(found.value, found.failed or broken, broke=True))
            os._exit(1)  # an orderly end would use the device
        pipe.send(found)


@dataclass
class _Worker:
    work: Callable[[Any], Any]
    index: int
    job: Any
    first: bool = True
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(self.work, theirs))
        self.process.start()
        theirs.close()
        self._hand()

    def take(self, index: int, job: Any) -> None:
        """The next job."""
        self.index, self.job, self.first, self.began = index, job, False, time.monotonic()
        self._hand()

    def _hand(self) -> None:
        with suppress(OSError):  # one that died meanwhile is noticed when it says nothing more
            self.pipe.send(self.job)

    def said(self) -> Outcome | None:
        """What is in the pipe; None: it is ready, and at its first job from now on."""
        try:
            found: Outcome | None = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            died = f"CUDA error: the process died (exit status {self.process.exitcode})"
            return Outcome(failed=died, broke=True)
        if found is None:
            self.began = time.monotonic()
        return found

    def end(self, kindly: bool) -> None:
        """No process is left."""
        self.pipe.close()
        if not kindly:
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def each_ended(
    work: Callable[[Any], Any],
    jobs: Iterable[Any],
    deadline: float,
    workers: int | None = None,
    limit: float = math.inf,
) -> Iterator[tuple[int, Outcome]]:
    """Every job that ended in time, as it ends: its number and what became of it.

    No process is left: one that went on would share the device with what is timed next.

    Args:
        work: a function of a module.
        jobs: its arguments; the next is asked for when a worker is free.
        deadline: of `time.monotonic`.
        workers: how many processes; as many as the machine has cores when None.
        limit: seconds for one job, after which its process is ended.
    """
    left = enumerate(jobs)
    crew: list[_Worker] = []
    try:
        most = workers or os.cpu_count() or 1
        while len(crew) < most and time.monotonic() < deadline:
            following = next(left, None)
            if following is None:
                break
            crew.append(_Worker(work, *following))
        while crew and time.monotonic() < deadline:
            late = min(worker.began for worker in crew) + limit
            pause = max(min(deadline, late) - time.monotonic(), 0)
            wait([worker.pipe for worker in crew], min(pause, 3600))
            for worker in list(crew):
                found = worker.said() if worker.pipe.poll() else None
                if found is None and time.monotonic() - worker.began > limit:
                    found = Outcome(failed=f"{LATE} {limit:.0f} s", broke=True)
                if found is None:
                    continue
                at_fault = worker.first or not found.failed or found.failed.startswith(LATE)
                if found.broke and not at_fault:
                    following = (worker.index, worker.job)
                else:
                    yield worker.index, found
                    following = next(left, None)
                if following is not None and not found.broke:
                    worker.take(*following)
                    continue
                crew.remove(worker)
                worker.end(kindly=not found.broke)
                if following is not None:
                    crew.append(_Worker(work, *following))
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:
            worker.end(kindly=False)


def side_by_side(
    work: Callable[[Any], Any],
    jobs: Iterable[Any],
    deadline: float,
    workers: int | None = None,
    limit: float = math.inf,
) -> list[Outcome | None]:
    """What became of every job, in order; None of those that did not end in time.

    Arguments as of `each_ended`.
    """
    given = list(jobs)
    ended = dict(each_ended(work, given, deadline, workers, limit))
    return [ended.get(index) for index in range(len(given))]
