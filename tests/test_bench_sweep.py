"""`python kernels/bench/sweep.py` on a CPU, with made-up programs: time, failures, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "kernels" / "bench"

SWEEP = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import sweep
from cases import Case
from pools import Outcome
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "Some GPU"
os.cpu_count = lambda: 1
ran = []
def each_ended(work, jobs, deadline, workers=None, limit=0):
    for index, (case, config) in enumerate(jobs):
        if time.monotonic() > deadline:
            return
        ran.append((work.__name__, case.name))
        if work is sweep.compile_one:
            late = config.keys == 16
            failed = "OutOfMemoryError: CUDA out of memory" * (config.warps == 8)
            if not late:
                yield index, Outcome("no registers" if config.stages == 4 else None, failed)
        elif config.warps == 2:
            yield index, Outcome(failed="RuntimeError: CUDA error", broke=True)
        else:
            yield index, Outcome({"ms": {"1": 1.0 + config.stages}, "chosen_ms": 2.0})
def side_by_side(work, jobs, deadline, limit):
    ended = dict(each_ended(work, jobs, deadline))
    return [ended.get(index) for index in range(len(jobs))]
sweep.each_ended, sweep.side_by_side = each_ended, side_by_side
sweep.GRID = {"attention prefill 64": (
    (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 2, 2), (64, 64, 4, 4), (64, 16, 4, 2),
)}
sweep.SWEEP = tuple(Case(x, "attention", 1, 4, 2, 64, 64, 64) for x in "abc")
sys.argv = ["sweep.py", "--out", sys.argv[2], "--minutes", sys.argv[3]]
assert sweep.main() == 0
timed = [name for what, name in ran if what == "time_one"]
assert timed == ([] if sys.argv[4] == "0" else [*"aaabbbccc"]), ran
compiled = [name for what, name in ran if what == "compile_one"]
assert not timed or ran.index(("time_one", "a")) < ran.index(("compile_one", "b"))
"""


def test_every_case_is_compiled_and_timed_and_a_failure_is_an_entry(tmp_path: Path) -> None:
    place = tmp_path / "sweep-some-gpu.json"
    earlier = [{"case": "a", "config": {"rows": 1}, "ms": {"1": 9.0}}]
    place.write_text(json.dumps({"rows": earlier}))
    for minutes in ("1", "0"):
        run = subprocess.run(
            [sys.executable, "-c", SWEEP, str(BENCH), str(tmp_path), minutes],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        rows = json.loads(place.read_text())["rows"]
        assert rows[0] == earlier[0]  # what is not swept again stays as it was
        assert len(rows) == 1 + 3 * 4
        refused = {
            row["case"] + str(row["config"]["warps"]): row for row in rows if "refused" in row
        }
        assert {key[1:] for key in refused} == {"2", "4"}
        assert refused["b4"]["refused"] == "no registers"
        assert {row["ms"]["1"] for row in rows[1:] if "ms" in row} == {3.0}
    assert "no time for a" in run.stdout
