"""`python kernels/bench` from checks to goals, on a CPU with made-up times: what a run keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "kernels" / "bench"

# one problem of every op is run on the CPU, whose times are made up: 1 ms of ours, 3 ms of others;
# jobs run in this process, one after the other
BEGIN = """
import json, sys, time
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.modules["pydantic"] = sys.modules["matplotlib"] = None  # a machine with a GPU may lack them
import importlib.util
spec = importlib.util.spec_from_file_location("bench_main", sys.argv[1] + "/__main__.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
import peers, problems, record, rows, speed
from cases import Case
from pools import Outcome, told
from timing import Timed
from torch.nn.attention import SDPBackend
problems.DEVICE = "cpu"
peers.BACKENDS = {"flash": SDPBackend.MATH}
peers.find_spec = lambda name: None
record.torch.cuda.get_device_name = lambda: "Some GPU"
record.torch.cuda.is_available = lambda: True
def measured(calls):
    calls[0]()
    mine = getattr(calls[0], "__self__", None) is not None
    return Timed(1.0 if mine else 3.0, False)
rows.measured, rows.eager_ms = measured, lambda calls: 2.0
rows.events_ms = lambda calls: 4.0 if calls[0]() else 5.0
problems.Problem.config = lambda self: {"rows": 16}
rows.input_sets = lambda size: 1
asked = []
def each_ended(work, jobs, deadline, workers, limit):
    for index, job in enumerate(jobs):
        if time.monotonic() > deadline:
            return
        asked.append((job.case.name, job.part, job.peer))
        try:
            yield index, Outcome(work(job))
        except Exception as error:
            yield index, Outcome(failed=told(error))
speed.each_ended = each_ended
bench.compile_all = lambda cases, deadline: None
bench.ceilings = lambda: {"copy_gb_per_s": 1000.0, "matmul_tflops": 100.0, "matmul_fp32_tflops": 10}
wrong, checked = set(), []
def check(keys, deadline):
    checked.append(keys)
    return [
        {**key._asdict(), "name": str(key), "error": 0.5, "ok": key[0] not in wrong and
         key not in wrong} for key in sorted(keys)
    ]
bench.check = check
out = Path(sys.argv[2])
def run(minutes=5, go_on=Path(), **options):
    options = dict(
        out=out, only="", no_check=False, check_only=False, incomplete=False
    ) | options
    asked.clear(), checked.clear()
    return bench.run(Namespace(minutes=minutes, go_on=go_on, **options))
def report():
    return json.loads((out / "some-gpu.json").read_text())
def timed():
    return [row["case"] for row in report()["speed"] if "ms" in row]
"""
RUN = """
bench.SPEED = (
    Case("a", "attention", 1, 4, 2, 64, 64, 16, backward=True, goals=("backward",)),
    Case("b", "latent_attention", 2, 16, 1, 1, 64, 32, 16, goals=("bytes of the original",)),
    Case("c", "sparse_attention", 1, 8, 8, 256, 256, 16, pattern="30 % of blocks",
         goals=("density",)),
    Case("d", "routed_attention", 1, 4, 2, 64, 64, 16, share=0.5, goals=("share of dense",)),
    Case("e", "linear_attention", 1, 2, 2, 64, 64, 16, decay="head", backward=True),
    Case("f", "attention", 1, 4, 2, 64, 64, 16, dtype="float32"),
)
from proofs import Key, keys_of
wide = Case("w", "latent_attention", 64, 16, 1, 1, 131072, 512, 64)
assert keys_of(wide) == {Key("latent_attention", "bfloat16", p) for p in ("forward", "addresses")}
wrong.add("routed_attention")
assert run(minutes=0, go_on=None) == 1  # one op is red, and there is no time
assert report()["speed"] == [] and len({row["op"] for row in report()["checks"]}) == 5
real, calls = speed.timed, []
def stop(job):
    calls.append(job)
    if job.case.name == "b":
        raise KeyboardInterrupt
    return real(job)
speed.timed = stop
try:
    run(go_on=None)
except KeyboardInterrupt:
    pass
kept = report()
assert timed() == ["a"]  # what was measured is not lost
speed.timed = real
wrong.clear()
assert run() == 0
whole = report()
assert {key.op for key in checked[0]} == {"routed_attention"}
assert timed() == list("abcdef")
assert whole["speed"][0] == kept["speed"][0]
run(only="a", no_check=True, go_on=None)
assert report() == whole  # a part replaces nothing
assert run() == 0 and not asked and not checked[0]  # nothing is left
odd = Key("latent_attention", "float32", "forward")  # nothing that is timed needs it
row = next(row for row in whole["checks"] if row["name"] == str(odd))
row["ok"] = False
record.write(whole, out / "some-gpu.json")
assert run(check_only=True) == 0 and checked == [{odd}] and not asked
from table import cells
assert cells({"case": "x", "refused": "no memory"})[-1] == "refused: no memory"
assert cells(whole["speed"][0] | {"eager": True})[1].endswith("(no graph)")
"""


def ran(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [sys.executable, "-c", BEGIN + script, str(BENCH), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "some-gpu.json").read_text())
    return {row["case"]: row for row in report["speed"]}


def test_a_run_keeps_what_it_measured_and_times_no_op_that_is_wrong(tmp_path: Path) -> None:
    run = ran(RUN, tmp_path)
    assert "routed_attention forward in bfloat16 is not timed" in run.stderr
    assert "nothing will be written: no checks" in run.stdout
    rows = rows_of(tmp_path)
    assert not [row["refused"] for row in rows.values() if "refused" in row]
    assert rows["a"]["backward_ms"] == 1.0
    assert rows["a"]["peers"]["flash"]["times_faster"] == 3.0
    assert set(rows["b"]["peers"]) == {"flash, original MHA", "flash, original 8 KV heads"}
    assert rows["c"]["density"] > 0.3
    assert {"flash", "masked"} <= set(rows["c"]["peers"])
    assert {"flash", "ours, all heads"} <= set(rows["d"]["peers"])
    # fp32 has a ceiling of its own
    assert rows["f"]["floor_ms"] >= 2 * rows["a"]["floor_ms"]
    for goal in ("backward", "bytes of the original", "density", "share of dense"):
        assert f"| {goal} | " in run.stdout


FAILING = """
shape = ("attention", 1, 4, 2, 64, 64, 16)
bench.SPEED = (
    Case("a", *shape), Case("b", *shape), Case("c", *shape, backward=True),
    Case("d", *shape, dtype="float32", backward=True),
)
bad = {("a", "forward", ""), ("c", "backward", "")}
real = speed.timed
def timed_or_not(job):
    if (job.case.name, job.part, job.peer) in bad:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return real(job)
speed.timed = timed_or_not
from proofs import Key
wrong.add(Key("attention", "float32", "backward"))
assert run(go_on=None) == 1
assert timed() == list("bcd")  # a wrong gradient in fp32 leaves all forwards
kept = {row["case"]: row for row in report()["speed"]}
assert "illegal" in kept["a"]["refused"] and "illegal" in kept["c"]["backward_refused"]
assert "failed" in kept["d"]["backward_refused"]
bench.SPEED += (Case("e", *shape),)
assert run() == 1
assert asked[0][0] == "e" and ("a", "forward", "") in asked  # what failed comes after what is new
bad.clear(), wrong.clear()
assert run() == 0
assert checked == [{Key("attention", "float32", "backward")}]
assert timed() == list("abcde") and not [r for r in report()["speed"] if "backward_refused" in r]

# another kernel: checked again, timed again
bench.sources = lambda op: "changed"
real_check = bench.check
bench.check = lambda *a: [row | {"ok": False, "error": "out of time"} for row in real_check(*a)]
assert run() == 1 and len(checked[0]) > 4 and not asked
assert timed() == list("abcde")
bench.check = real_check
wrong.add("attention")
assert run() == 1 and not asked and not timed()  # no time of kernels that are wrong now
wrong.clear()
assert run() == 0 and [name for name, part, peer in asked if not peer] == list("abccdde")

# peers that cannot be named, that fail forward or backward only, or that take too long
from dataclasses import replace
first = peers.peers
def raising(case):
    raise ImportError("no such package")
speed.peers = raising
bench.SPEED += (Case("f", *shape, backward=True),)
assert run() == 0
assert "no such package" in report()["speed"][-1]["peers_refused"]
def refuse():
    raise RuntimeError("legacy stream")
def some(case):
    yield peers.Peer("good", case, lambda p: lambda: None, lambda p: lambda: 1)
    yield peers.Peer("half", case, lambda p: lambda: None, lambda p: refuse)
    yield peers.Peer("none", case, lambda p: refuse, lambda p: lambda: None)
    yield peers.Peer("late", case, lambda p: slow)
def slow():
    raise TimeoutError
speed.peers = rows.peers = some
real_ended = speed.each_ended
def each_ended(*a):
    for index, outcome in real_ended(*a):
        late = outcome.failed.startswith("TimeoutError")
        yield index, replace(outcome, failed="took longer than 9 s") if late else outcome
speed.each_ended = each_ended
assert run(only="f") == 0
found = report()["speed"][-1]
assert "peers_refused" not in found and found["backward_events_ms"] == 4.0
good, half, none = (found["peers"][name] for name in ("good", "half", "none"))
assert good["backward_ms"] == 4.0 and good["backward_eager"] and good["times_faster"] == 3.0
assert half["ms"] == 3.0 and "legacy stream" in half["backward_refused"]
assert set(none) == {"refused"}
assert run(only="f") == 0 and asked == [("f", "forward", "late")]  # the only one tried again
"""


def test_what_fails_loses_nothing_else_and_is_tried_again_last(tmp_path: Path) -> None:
    ran(FAILING, tmp_path)


LACKING = """
import wheels
bench.SPEED = (
    Case("a", "attention", 1, 4, 2, 64, 64, 16, goals=("backward",)),
    Case("b", "sparse_attention", 1, 8, 8, 256, 256, 16, pattern="s2", goals=("density",)),
    Case("c", "linear_attention", 1, 2, 2, 64, 64, 16, goals=("fla forward", "backward")),
)
wheels.find_spec = lambda name: None if name in ("pydantic", "einops") else object()
assert run(go_on=None) == bench.EXIT_INCOMPLETE and not checked and not asked
assert run(go_on=None, only="a") == 0
bench.compile_all = lambda cases, deadline: None
assert run(go_on=None, incomplete=True) == 0
assert timed() == ["a", "c"] and "pydantic" in report()["speed"][1]["refused"]
"""


def test_missing_packages_are_told_before_time_is_spent(tmp_path: Path) -> None:
    lines = ran(LACKING, tmp_path).stderr.splitlines()
    assert "no pydantic (" in lines[0]
    assert "times of 1 problems, 1 goals (density)" in lines[0]
    assert "no einops (wheels: fla-core, einops): without peers of 1 problems" in lines[0]
    assert "(fla forward)" in lines[0]


def test_plots_of_a_device_without_results(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "report", "--device", "none", "--plots", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("no results of 'none'")
    assert "nvidia-h200" in run.stderr
