"""`python kernels/bench`: on a GPU, check the kernels, then time them against their peers.

No forward and no gradient of an op is timed in a dtype in which a check of it failed. The device's
own ceilings (copy bandwidth, matrix rate) are measured first: every case has a floor, the larger of
its bytes over the one and its arithmetic over the other. Results go to ``kernels/bench/results``
with the device, the date and the versions, after every time; `--minutes` ends a run early, and
`--continue` adds to what an earlier one wrote, and checks again what has changed since. Without a
GPU: exit code 5. `python kernels/bench report` prints the committed results as Markdown, and with
`--plots` draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from checking import check, listed, listed_huge
from goals import goal_table, judge_all
from proofs import Key, failed, key_of, keys_of, needs, sources, timed_as, unproven
from record import head, no_gpu, place, write
from registry import SPEED
from report import RESULTS, print_tables, write_plots
from rows import Row
from speed import COMPILE_SECONDS, Report, compile_all, lacks, time_all
from table import table
from timing import copy_gb_per_s, matmul_tflops
from wheels import lacking

EXIT_WRONG = 1
EXIT_INCOMPLETE = 3  # packages are missing that some problems need
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


def begin(options: argparse.Namespace, path: Path) -> tuple[Report, bool]:
    """A new report, or (True) the earlier one to go on with: of the same device and versions."""
    prints = {op: sources(op) for op in sorted({case.op for case in SPEED})}
    report = head("python kernels/bench") | {
        "sources": prints, "ceilings": {}, "checks": [], "speed": [],
    }  # fmt: skip
    source = options.go_on
    if source is None:
        return report, False
    if source == Path():
        source = path
    elif not source.exists():
        raise SystemExit(f"{source} does not exist: name what an earlier run wrote, or no file")
    if not source.exists():
        return report, False
    old: Report = json.loads(source.read_text("utf-8"))
    same = all(old[key] == report[key] for key in ("device", "versions"))
    if not same or "sources" not in old:
        say(f"{source} is of another device, of other versions or older: begun anew")
        return report, False
    changed = {op for op, told in prints.items() if old["sources"].get(op) != told}
    if changed:
        say(f"checked and timed again, as their sources changed: {', '.join(sorted(changed))}")
    old["checks"] = [row for row in old["checks"] if row["op"] not in changed]
    return old | {"date": report["date"], "sources": prints}, True


def save(report: Report, path: Path, kept: bool) -> None:
    """Write, unless what ran was unproven or a part that would replace the whole."""
    if kept:
        write(report, path)


def prove(options: argparse.Namespace, report: Report, keys: set[Key], deadline: float) -> None:
    """Check what is not proven of the ops that are timed; rows of `report`."""
    ops = {key.op for key in keys}
    every = {one.key for one in (*listed(ops), *listed_huge(ops))} | keys
    todo = set(unproven(report["checks"], every))
    report["checks"] = [row for row in report["checks"] if key_of(row) not in todo]
    left = deadline - time.monotonic()
    share = 1.0 if options.check_only else CHECK_SHARE
    report["checks"] += check(todo, time.monotonic() + share * left)


def run(options: argparse.Namespace) -> int:
    """Check, time, write; returns the exit status."""
    deadline = time.monotonic() + 60 * options.minutes
    path = place(head(""), options.out)
    report, went_on = begin(options, path)
    kept = not options.no_check and (not options.only or went_on)
    if not kept:
        say("nothing will be written: " + ("no checks" if options.no_check else "only some cases"))
    rows = {row["case"]: row for row in report["speed"]}
    named = [case for case in SPEED if options.only in case.name]
    cases = named
    if not options.check_only:
        cases = [c for c in named if lacks(c, rows.get(c.name), report["sources"])]
    missing = "" if options.check_only else lacking(cases)
    if missing:
        sys.stderr.write(missing + "\n")
        if not options.incomplete:
            sys.stderr.write("  next: carry these wheels (kernels/README.md), or --incomplete\n")
            return EXIT_INCOMPLETE
    keys = {key for case in cases for key in keys_of(case)}
    red: dict[Key, str] = {}
    if not options.no_check:
        prove(options, report, keys, deadline)
        # of kernels that were changed since, and are wrong now
        gone = failed(report["checks"])
        report["speed"] = [row for row in report["speed"] if timed_as(row) not in gone]
        save(report, path, kept)
        red = unproven(report["checks"], keys)
    for key, why in sorted(red.items()):
        sys.stderr.write(f"{key.op} {key.part} in {key.dtype} is not timed: {why}\n")
    say(f"{sum(row['ok'] for row in report['checks'])} of {len(report['checks'])} checks passed")
    wrong = any(not row["ok"] for row in report["checks"])
    if options.check_only:
        return EXIT_WRONG if red or wrong else 0
    cases = [case for case in cases if not needs(case, "forward") & red.keys()]
    compile_all(cases, min(deadline, time.monotonic() + COMPILE_SECONDS))
    if not report["ceilings"]:
        report["ceilings"] = ceilings()
        torch.cuda.empty_cache()
    say(f"ceilings: {report['ceilings']}")

    def saved(row: Row) -> None:
        save(report, path, kept)
        say(str({name: value for name, value in row.items() if name != "shape"}))

    time_all(cases, report, red, report["sources"], deadline, saved)
    order = {case.name: place for place, case in enumerate(SPEED)}
    report["speed"].sort(key=lambda row: order.get(row["case"], len(order)))
    save(report, path, kept)
    told = f"wrote {path}" if kept else "nothing written"
    say(f"{told}: {len(report['speed'])} of {len(SPEED)} problems")
    say(table(report))
    say(goal_table(judge_all([(c.name, c.goals) for c in SPEED], report["speed"])))
    return EXIT_WRONG if red or wrong else 0


def main() -> int:
    """What the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--device", default="nvidia-h200", help="whose results to report")
    parser.add_argument("--plots", type=Path, help="with report: folder for the plots")
    parser.add_argument("--check-only", action="store_true", help="do not time")
    parser.add_argument(
        "--no-check", action="store_true", help="time only, unproven: nothing is written"
    )
    parser.add_argument(
        "--incomplete", action="store_true", help="go on without packages that problems need"
    )
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
            return write_plots(options.device, options.plots)
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
