"""Jobs side by side in processes of their own, which end in time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any


def side_by_side(
    work: Callable[[Any], Any], jobs: Iterable[Any], deadline: float
) -> list[Future[Any]]:
    """What became of every job, in order; those that did not end in time are not `done`.

    No process is left: one that went on would share the device with what is timed next.

    Args:
        work: a function of a module.
        jobs: its arguments.
        deadline: of `time.monotonic`.
    """
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=spawn)
    futures = [pool.submit(work, job) for job in jobs]
    wait(futures, max(deadline - time.monotonic(), 0))
    ended = [future for future in futures if future.done()]
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=len(ended) == len(futures), cancel_futures=True)
    if len(ended) < len(futures):
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
            while worker.is_alive():  # the pool's own thread was told of its end, and notes it soon
                time.sleep(0.01)
    unfinished: Future[Any] = Future()
    return [future if future in ended else unfinished for future in futures]
