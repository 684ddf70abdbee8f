"""The processes of the GPU benchmark on a CPU: jobs that break one, hang, or come after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "kernels" / "bench"

# what a worker's device does is made up: job 3 breaks it for what follows in that process
JOBS = """
import os, sys, time
class Torch:
    broken = False
    class cuda:
        is_initialized = staticmethod(lambda: True)
        @staticmethod
        def synchronize():
            if Torch.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
sys.modules["torch"] = Torch
def illegal(job):
    if Torch.broken or job == 3:
        Torch.broken = True
        raise RuntimeError("CUDA error")
    return job
def abort(job):
    if job == 3:
        os.abort()
    return job
def once(job):  # fails beside others, not alone
    if job == 3 and illegal.__dict__.get("ran"):
        os.abort()
    illegal.ran = True
    return job
def spoiled(job):
    import pools
    if job == 1:
        pools.spoil()
    return os.getpid()
def hang(job):
    time.sleep(600 if job == 3 else 0)
    return job
"""
POOL = """
import sys, time
sys.path[:0] = sys.argv[1:]
import jobs
from pools import LATE, each_ended, side_by_side
if __name__ == "__main__":
    end = time.monotonic() + 100
    for work, why in ((jobs.illegal, "RuntimeError"), (jobs.abort, "CUDA error: the process died")):
        found = side_by_side(work, range(10), end, 2)
        assert [one.value for one in found] == [*range(3), None, *range(4, 10)], found
        assert found[3].failed.startswith(why) and found[3].broke
    assert [one.value for one in side_by_side(jobs.once, range(5), end, 1)] == [*range(5)]
    first, last, other = (one.value for one in side_by_side(jobs.spoiled, range(3), end, 1))
    assert first == last != other
    found = side_by_side(jobs.hang, range(5), end, 1, 1.0)
    assert [bool(one.failed) for one in found] == [False, False, False, True, False]
    assert found[3].failed.startswith(LATE)
    asked = []
    def given():
        for job in range(3):
            asked.append(job)
            yield job
    for index, outcome in each_ended(jobs.abort, given(), end, 1):
        assert asked[-1] == index == outcome.value  # the next is asked for when this one is told
    began = time.monotonic()
    short, long = side_by_side(time.sleep, [0.01, 600], began + 4)
    assert short is not None and long is None and time.monotonic() - began < 30
    import multiprocessing
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
"""


def test_only_the_job_at_fault_is_lost_and_no_process_is_left(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(JOBS)
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    run = subprocess.run(
        [sys.executable, str(script), str(BENCH), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
