"""`python kernels/bench/aot.py`: compile every shipped kernel for every target, write a report.

Needs no GPU. The report (``kernels/bench/results/aot.json``) is committed; a test compares it
with the configuration table. Exit status 1 when a kernel breaks a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

import triton

from reattend.kernels.aot import compile_target
from reattend.kernels.targets import TARGETS

RESULTS = Path(__file__).parent / "results" / "aot.json"


def main() -> int:
    """Compile, print one line per target, write the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write")
    names = [target.name for target in TARGETS]
    parser.add_argument("--target", choices=names, nargs="+", default=names, help="default: all")
    asked = parser.parse_args()
    path, targets = asked.out, [t for t in TARGETS if t.name in asked.target]
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("unset TRITON_INTERPRET: the interpreter replaces the compiler\n")
        return 2
    kernels = []
    for target in targets:
        compiled = compile_target(target)
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
        "targets": [asdict(target) for target in targets],
        "kernels": kernels,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")
    return 1 if any(entry["problems"] for entry in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
