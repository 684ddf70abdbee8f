"""The command line of a benchmark on a CPU: one thread, a case after another, one JSON file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import head, write


def main(
    document: str | None,
    command: str,
    cases: Sequence[Any],
    run: Callable[[Any, int], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    rounds: int,
    packages: Sequence[str] = (),
) -> None:
    """Measure, write and print.

    Args:
        document: of the script; its first line is shown by --help.
        command: that makes the committed file.
        cases: each with a `name`.
        run: measures one, in so many rounds.
        table: the results as Markdown.
        rounds: unless --rounds says otherwise.
        packages: whose versions are told beside torch's.
    """
    parser = argparse.ArgumentParser(description=(document or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--only", default="", help="cases named so")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [run(case, asked.rounds) for case in cases if asked.only in case.name]
    report = {**head(command, *packages), "threads": 1, "rounds": asked.rounds, "rows": rows}
    write(report, asked.out)
    sys.stdout.write(table(report) + "\n")
