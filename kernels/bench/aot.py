"""`python kernels/bench/aot.py`: compile every shipped kernel for every target, write a report.

Needs no GPU. The report (``kernels/bench/results/aot.json``) is committed; a test compares it
with the configuration table. Exit status 1 when a kernel breaks a limit. With ``--only sparse`` the
kernels named so are compiled, with ``--target sm_90`` those of that target, and the report's other
entries are kept: they must be of the same Triton.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import triton

from reattend.kernels.aot import compile_target
from reattend.kernels.targets import TARGETS

RESULTS = Path(__file__).parent / "results" / "aot.json"


def kept(path: Path, only: str, targets: list[str]) -> list[dict[str, Any]] | None:
    """Entries of the report that are not compiled again; None when another Triton made them."""
    if not path.exists():
        return []
    report = json.loads(path.read_text("utf-8"))
    if report["triton"] != triton.__version__:
        return None
    return [
        entry
        for entry in report["kernels"]
        if not (entry["kernel"].startswith(only) and entry["target"] in targets)
    ]


def order(entry: dict[str, Any], names: list[str]) -> tuple[Any, ...]:
    """Where an entry stands in the report."""
    kernel = (entry["kernel"], entry["element_bytes"], entry["width"])
    return (names.index(entry["target"]), *kernel, entry["variant"] != "plain")


def main() -> int:
    """Compile, print one line per target, write the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write")
    names = [target.name for target in TARGETS]
    parser.add_argument("--target", choices=names, nargs="+", default=names, help="default: all")
    parser.add_argument("--only", default="", help="kernels whose names begin so; keep the others")
    asked = parser.parse_args()
    path, targets = asked.out, [t for t in TARGETS if t.name in asked.target]
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("unset TRITON_INTERPRET: the interpreter replaces the compiler\n")
        return 2
    partial = asked.only or len(targets) < len(TARGETS)
    kernels = kept(path, asked.only, asked.target) if partial else []
    if kernels is None:
        sys.stderr.write(
            f"{path} is of another Triton than {triton.__version__}: compile all of it\n"
        )
        return 2
    for target in targets:
        compiled = compile_target(target, asked.only)
        bad = [c for c in compiled if c.problems]
        seconds = sum(c.seconds for c in compiled)
        sys.stdout.write(
            f"{target.name}: {len(compiled)} kernels, {len(bad)} over a limit, {seconds:.0f} s\n"
        )
        for c in bad:
            sys.stdout.write(
                f"  {c.kernel} {c.width} {c.element_bytes} {c.variant}: {c.problems}\n"
            )
        # compile times would change the file at every run
        kernels += [{k: v for k, v in asdict(c).items() if k != "seconds"} for c in compiled]
    report = {
        "command": "python kernels/bench/aot.py",
        "date": date.today().isoformat(),
        "triton": triton.__version__,
        "targets": [asdict(t) for t in TARGETS if t.name in {k["target"] for k in kernels}],
        "kernels": sorted(kernels, key=lambda entry: order(entry, names)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")
    return 1 if any(entry["problems"] for entry in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
