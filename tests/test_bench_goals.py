"""What the GPU benchmark makes of measurements: goals and plots."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "kernels" / "bench"


def bench_module(name: str) -> Any:
    """A module of the benchmark, which is no package."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


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


def test_the_first_problems_have_every_goal() -> None:
    """A run with little time tells something about each."""
    speed = bench_module("registry").SPEED
    first = {goal for case in speed[:13] for goal in case.goals}
    assert first == set(bench_module("goals").GOALS)
    assert len({case.name for case in speed}) == len(speed)
