"""Building block layouts of the benchmark's patterns on the host, as a model's layers ask for them.

    python kernels/bench/layout_cpu.py --out kernels/bench/results/layout_cpu.json

All head classes of 32 layers ask for a layout of a length they have not seen, then again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import problems
from cases import Case
from cpu_run import main
from model_tables import layout_table
from patterns import layout_of
from registry import SPEED
from rows import layout_times

COMMAND = "python kernels/bench/layout_cpu.py --out kernels/bench/results/layout_cpu.json"


def cases() -> Iterator[Case]:
    """Prompts with a pattern of terms, short ones first."""
    found = [c for c in SPEED if c.pattern and not c.decodes and not c.pattern.endswith("blocks")]
    yield from sorted(found, key=lambda case: (case.pattern, case.m))


def run(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    problems.DEVICE = "cpu"
    layout = layout_of(case)
    return {
        "case": case.name,
        "patterns": layout.row_ptr.shape[0],
        "entries": len(layout.col),
        **layout_times(case, rounds, time.process_time),
    }


if __name__ == "__main__":
    main(__doc__, COMMAND, list(cases()), run, layout_table, 7)
