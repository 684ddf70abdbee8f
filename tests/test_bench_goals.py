"""What the GPU benchmark does with measurements, on a CPU: rows, time limits, goals, plots."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "kernels" / "bench"

# one problem of every op is run on the CPU, whose times are made up: 1 ms of ours, 3 ms of others
RUN = """
import json, sys, time
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
sys.modules["pydantic"] = sys.modules["matplotlib"] = None  # a machine with a GPU may lack them
import importlib.util
spec = importlib.util.spec_from_file_location("bench_main", sys.argv[1] + "/__main__.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
import peers, problems, record, rows
from cases import Case
from timing import Timed
from torch.nn.attention import SDPBackend
problems.DEVICE = "cpu"
peers.BACKENDS = {"flash": SDPBackend.MATH}
record.torch.cuda.get_device_name = lambda: "Some GPU"
record.torch.cuda.is_available = lambda: True
ours = []
def measured(calls):
    calls[0]()
    mine = getattr(calls[0], "__self__", None) is not None
    return Timed(1.0 if mine else 3.0, False)
rows.measured, rows.eager_ms = measured, lambda calls: 2.0
problems.Problem.config = lambda self: {"rows": 16}
rows.input_sets = lambda size: 1
bench.SPEED = (
    Case("a", "attention", 1, 4, 2, 64, 64, 16, backward=True, goals=("backward",)),
    Case("b", "latent_attention", 2, 16, 1, 1, 64, 32, 16, goals=("bytes of the original",)),
    Case("c", "sparse_attention", 1, 8, 8, 256, 256, 16, pattern="30 % of blocks",
         goals=("density",)),
    Case("d", "routed_attention", 1, 4, 2, 64, 64, 16, share=0.5, goals=("share of dense",)),
    Case("e", "linear_attention", 1, 2, 2, 64, 64, 16, decay="head", backward=True),
    Case("f", "attention", 1, 4, 2, 64, 64, 16, dtype="float32"),
)
bench.check = lambda ops, deadline: [
    {"op": op, "name": op, "error": 0.5, "ok": op != "routed_attention"} for op in sorted(ops)
]
bench.compile_all = lambda cases, deadline: None
bench.ceilings = lambda: {"copy_gb_per_s": 1000.0, "matmul_tflops": 100.0, "matmul_fp32_tflops": 10}
out = Path(sys.argv[2])
options = dict(out=out, only="", go_on=None, no_check=False, check_only=False)
assert bench.run(Namespace(minutes=0, **options)) == 1  # one op is red, and there is no time
first = json.loads((out / "some-gpu.json").read_text())
assert first["speed"] == [] and len(first["checks"]) == 5
real, limit = bench.time_case, []
def stop(case, given):
    limit.append(case)
    if len(limit) == 2:
        raise KeyboardInterrupt
    return real(case, given)
bench.time_case = stop
try:
    bench.run(Namespace(minutes=5, **options))
except KeyboardInterrupt:
    pass
kept = json.loads((out / "some-gpu.json").read_text())
assert [row["case"] for row in kept["speed"]] == ["a"]  # what was measured is not lost
bench.time_case = real
bench.check = lambda ops, deadline: [
    {"op": op, "name": op, "error": 0.5, "ok": True} for op in sorted(ops)
]
assert bench.run(Namespace(minutes=5, **(options | {"go_on": Path()}))) == 0
whole = json.loads((out / "some-gpu.json").read_text())
assert [row["case"] for row in whole["speed"]] == list("abcdef")
assert len(whole["checks"]) == 5
assert whole["speed"][0] == kept["speed"][0]
bench.run(Namespace(minutes=5, **(options | {"only": "a", "no_check": True})))
assert json.loads((out / "some-gpu.json").read_text()) == whole  # a part replaces nothing
from table import cells
assert cells({"case": "x", "refused": "no memory"})[-1] == "refused: no memory"
"""


def test_a_run_keeps_what_it_measured_and_times_no_op_that_is_wrong(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(BENCH), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "routed_attention is not timed" in run.stderr
    report = json.loads((tmp_path / "some-gpu.json").read_text())
    rows = {row["case"]: row for row in report["speed"]}
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


def bench_module(name: str) -> Any:
    """A module of the benchmark, which is no package."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


POOL = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pools import side_by_side
if __name__ == "__main__":
    began = time.monotonic()
    short, long = side_by_side(time.sleep, [0.01, 600], began + 4)
    assert short.done() and not long.done() and time.monotonic() - began < 30
    import multiprocessing
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
"""


def test_jobs_that_take_too_long_end_with_their_processes(tmp_path: Path) -> None:
    script = tmp_path / "jobs.py"
    script.write_text(POOL)
    run = subprocess.run(
        [sys.executable, str(script), str(BENCH)], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_whole_models_of_every_family_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "families.py"), "--device", "cpu", "--shapes", "tiny"]
    command += ["--contexts", "48", "--batch", "3", "--out", str(tmp_path)]
    reports = []
    for more in (["--families", "latent"], ["--continue"]):
        subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        reports.append(json.loads((tmp_path / "families-cpu.json").read_text()))
    first, report = reports
    assert report["rows"][:4] == first["rows"], "what was measured before is kept"
    assert not [row["refused"] for row in report["rows"] if "refused" in row]
    held = {row["family"]: row["cache_mb_per_sequence"] for row in report["rows"]}
    assert set(held) == {"original", "latent", "sparse", "routed", "linear"}
    assert all(held[name] < held["original"] for name in ("latent", "sparse", "linear"))
    most = {row["family"]: row["batch"] for row in report["rows"] if row["at"] == "equal memory"}
    assert most["sparse"] > 2 * most["original"]
    assert bench_module("model_tables").families_table(report).count("\n| tiny |") == len(
        report["rows"]
    )


def row(**rest: Any) -> dict[str, Any]:
    return {"case": "x", "ms": 1.0, "bound": "bytes", "fraction_of_floor": 0.9, "peers": {}} | rest


def peer(times_faster: float, **rest: float) -> dict[str, float]:
    return {"ms": times_faster, "times_faster": times_faster} | rest


def test_every_goal_can_be_reached_missed_and_left_open() -> None:
    goals = bench_module("goals")
    GOALS, judge, judge_all = goals.GOALS, goals.judge, goals.judge_all  # noqa: N806
    share = {"share": 0.5}
    pairs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "copy bandwidth": (row(), row(fraction_of_floor=0.84)),
        "bytes of the original": (
            row(peers={"flash, original MHA": peer(9, bytes_ratio=10)}),
            row(
                peers={
                    "flash, original MHA": peer(9, bytes_ratio=10),
                    "cudnn, original MHA": peer(8, bytes_ratio=10),  # the faster one counts
                }
            ),
        ),
        "flash at equal FLOPs": (
            row(peers={"flash, equal FLOPs": peer(0.91, flops_ratio=1.0)}),
            row(peers={"flash, equal FLOPs": peer(0.91, flops_ratio=1.1)}),
        ),
        "density": (
            row(density=0.1, peers={"flash": peer(8.1)}),
            row(density=0.1, peers={"flash": peer(7.9)}),
        ),
        "40 x flash": (
            row(density=0.02, peers={"flash": peer(41)}),
            row(density=0.02, peers={"flash": peer(39)}),
        ),
        "25.3 x flash": (
            row(density=0.02, peers={"flash": peer(26)}),
            row(density=0.02, peers={"flash": peer(25)}),
        ),
        "bytes of dense": (
            row(peers={"flash": peer(9, bytes_ratio=10), "cudnn": peer(8.6, bytes_ratio=10)}),
            row(peers={"flash": peer(9, bytes_ratio=10), "cudnn": peer(8.4, bytes_ratio=10)}),
        ),
        "share of dense": (
            row(peers={"flash": peer(3), "ours, all heads": peer(1.7)}, **share),
            row(peers={"flash": peer(1.6), "ours, all heads": peer(1.7)}, **share),
        ),
        "fla forward": (row(peers={"fla": peer(1.1)}), row(peers={"fla": peer(0.9)})),
        "fla backward": (
            row(backward_ms=2.0, peers={"fla": peer(1, backward_ms=2.1)}),
            row(backward_ms=2.0, peers={"fla": peer(1, backward_ms=1.9)}),
        ),
        "backward": (row(backward_ms=2.4), row(backward_ms=2.6)),
        "layout": (
            row(layout_first_ms=1.5, layout_layers=32, layout_again_ms=0.04),
            row(layout_first_ms=1.7, layout_layers=32, layout_again_ms=0.04),
        ),
    }
    assert set(pairs) == set(GOALS)
    for goal, (good, bad) in pairs.items():
        assert judge(goal, "x", good).ok is True, goal
        assert judge(goal, "x", bad).ok is False, goal
        assert judge(goal, "x", None).why == "unmeasured"
        assert judge(goal, "x", {"case": "x", "refused": "too large"}).why == "too large"
    assert judge("copy bandwidth", "x", row(bound="FLOPs")).ok is None
    slow = row(layout_first_ms=0.1, layout_layers=32, layout_again_ms=0.06)  # to find it again
    assert judge("layout", "x", slow).ok is False
    assert judge("layout", "x", row(layout_again_ms=0.01)).why == "unmeasured"  # an older row
    assert judge("25.3 x flash", "x", row(density=0.1, peers={"flash": peer(9)})).ok is None
    assert judge("density", "x", row(density=0.01, peers={"flash": peer(9)})).ok is None
    shown = goals.goal_table(
        judge_all([("x", ("backward",)), ("y", ("layout",))], [pairs["backward"][1]])
    )
    assert "0 reached, 1 missed, 0 do not apply or could not be judged, 1 unmeasured" in shown
    assert "Unmeasured, `layout`: y." in shown


def test_plots_of_families_with_two_points() -> None:
    results = json.loads((BENCH / "results" / "nvidia-h200.json").read_text("utf-8"))
    drawn = bench_module("plots").all_plots(results["speed"], results["device"])
    assert set(drawn) >= {"attention", "latent-decode"}
    for text in drawn.values():
        assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        assert "var(" not in text
        assert "floor" in text
