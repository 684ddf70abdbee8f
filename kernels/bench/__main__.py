"""`python kernels/bench`: on a GPU, check the kernels, then time them against their peers.

No speed of an op is reported while a kernel of it is wrong. The device's own ceilings (copy
bandwidth, matrix rate) are measured first: every case has a floor, the larger of its bytes over the
one and its arithmetic over the other. Results go to ``kernels/bench/results`` with the device, the
date and the versions, after every case; `--minutes` ends a run early, and `--continue` adds to what
an earlier one wrote. Without a GPU: exit code 5. `python kernels/bench report` prints the committed
results as Markdown, and with `--plots` draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cases import Case
from checking import check
from goals import goal_table, judge_all
from pools import side_by_side
from problems import compile_case
from record import head, no_gpu, place, write
from registry import SPEED
from report import RESULTS, print_tables, write_plots
from rows import time_case
from table import table
from timing import copy_gb_per_s, matmul_tflops

EXIT_WRONG = 1
#: of the time that is left, what checks may take before anything is timed
CHECK_SHARE = 0.5


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def ceilings() -> dict[str, float]:
    """GB/s of a copy, TFLOP/s of matrix products in bf16 and fp32."""
    found = {
        "copy_gb_per_s": copy_gb_per_s(),
        "matmul_tflops": matmul_tflops(),
        "matmul_fp32_tflops": matmul_tflops(4096, torch.float32),
    }
    return {name: round(value, 1) for name, value in found.items()}


def compile_all(cases: list[Case], deadline: float) -> None:
    """Leave every kernel on disk; what does not compile is reported when it is timed."""
    side_by_side(compile_case, cases, deadline)


def begin(options: argparse.Namespace, path: Path) -> tuple[dict[str, Any], bool]:
    """A new report, or (True) the earlier one to go on with: of the same device and versions."""
    report = head("python kernels/bench") | {"ceilings": {}, "checks": [], "speed": []}
    source = options.go_on
    if source is None:
        return report, False
    if source == Path():
        source = path
    elif not source.exists():
        raise SystemExit(f"{source} does not exist: name what an earlier run wrote, or no file")
    if not source.exists():
        return report, False
    old: dict[str, Any] = json.loads(source.read_text("utf-8"))
    same = all(old[key] == report[key] for key in ("device", "versions"))
    if not same or any("op" not in row for row in old["checks"]):
        say(f"{source} is of another device, of other versions or older: begun anew")
        return report, False
    old["speed"] = [row for row in old["speed"] if "ms" in row]  # what was refused is tried again
    return old | {"date": report["date"]}, True


def save(report: dict[str, Any], path: Path, kept: bool) -> None:
    """Write, unless what ran was unproven or a part that would replace the whole."""
    if kept:
        write(report, path)


def unproven(report: dict[str, Any], ops: set[str]) -> dict[str, str]:
    """Ops that may not be timed, and why."""
    checks = report["checks"]
    wrong = {row["op"]: row["name"] for row in checks if not row["ok"]}
    found = {op: f"{name!r} failed" for op, name in wrong.items()}
    return found | dict.fromkeys(ops - {row["op"] for row in checks}, "no check ran")


def run(options: argparse.Namespace) -> int:
    """Check, time, write; returns the exit status."""
    deadline = time.monotonic() + 60 * options.minutes
    path = place(head(""), options.out)
    report, went_on = begin(options, path)
    kept = not options.no_check and (not options.only or went_on)
    done = {row["case"] for row in report["speed"]}
    cases = [c for c in SPEED if options.only in c.name and c.name not in done]
    ops = {case.op for case in cases}
    if not options.no_check:
        proven = {row["op"] for row in report["checks"]} - set(unproven(report, set()))
        todo = ops - proven
        report["checks"] = [row for row in report["checks"] if row["op"] not in todo]
        left = deadline - time.monotonic()
        share = 1.0 if options.check_only else CHECK_SHARE
        report["checks"] += check(todo, time.monotonic() + share * left)
        save(report, path, kept)
    red = {} if options.no_check else unproven(report, ops)
    for op, why in red.items():
        sys.stderr.write(f"{op} is not timed: {why}\n")
    say(f"{sum(row['ok'] for row in report['checks'])} of {len(report['checks'])} checks passed")
    if options.check_only:
        return EXIT_WRONG if red else 0
    cases = [case for case in cases if case.op not in red]
    compile_all(cases, min(deadline, time.monotonic() + 150))
    report["ceilings"] = report["ceilings"] or ceilings()
    say(f"ceilings: {report['ceilings']}")
    for case in cases:
        if time.monotonic() > deadline:
            break
        row = time_case(case, report["ceilings"])
        report["speed"].append(row)
        save(report, path, kept)
        say(str(row))
    order = [case.name for case in SPEED]
    report["speed"].sort(key=lambda row: order.index(row["case"]))
    save(report, path, kept)
    told = f"wrote {path}" if kept else "nothing written"
    say(f"{told}: {len(report['speed'])} of {len(SPEED)} problems")
    say(table(report))
    say(goal_table(judge_all([(c.name, c.goals) for c in SPEED], report["speed"])))
    return EXIT_WRONG if red else 0


def main() -> int:
    """What the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--device", default="nvidia-h200", help="whose results to report")
    parser.add_argument("--plots", type=Path, help="with report: folder for the plots")
    parser.add_argument("--check-only", action="store_true", help="do not time")
    parser.add_argument("--no-check", action="store_true", help="time only; nothing is written")
    parser.add_argument("--only", default="", help="cases named so; written with --continue")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so many")
    parser.add_argument(
        "--continue", dest="go_on", nargs="?", type=Path, const=Path(), metavar="FILE",
        help="keep what this file tells (the one that would be written when none is named)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.what == "report":
        if options.plots:
            write_plots(options.device, options.plots)
        else:
            print_tables(options.device)
        return 0
    if not torch.cuda.is_available():
        return no_gpu(
            "run it on a machine with one; on this one, `python kernels/bench/aot.py` compiles"
            " every kernel for every target"
        )
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
