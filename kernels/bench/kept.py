"""Rows of a measurement that takes several calls: kept by what they are of, within a time.

A call keeps the rows that an earlier one wrote on the same device, with the same versions and
settings, and replaces those that it measures again; with `--continue` it measures what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from record import write

Row = dict[str, Any]
NO_MEMORY = "out of memory"
#: not what rows depend on
_OF_A_CALL = ("command", "date", "rows", "times_faster")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--minutes` and `--continue`."""
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no row that ends later")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="measure only what is missing"
    )


class Kept:
    """A report whose rows are written as they come.

    Args:
        report: what the file begins with; its rows come here.
        path: of the file.
        fields: what a row is of; the second is what is compared.
        options: `minutes` and `go_on`.
        times_faster: what the report tells of all its rows under that name.
    """

    def __init__(
        self,
        report: Row,
        path: Path,
        fields: tuple[str, ...],
        options: argparse.Namespace,
        times_faster: Callable[[list[Row]], Row] | None = None,
    ) -> None:
        self.report, self.path, self.fields = report, path, fields
        self.times_faster = times_faster
        self.deadline: float = time.monotonic() + 60 * options.minutes
        self.go_on: bool = options.go_on
        self.left: list[Row] = []
        report["rows"] = []
        if path.exists():
            old: Row = json.loads(path.read_text("utf-8"))
            if all(old.get(k) == v for k, v in report.items() if k not in _OF_A_CALL):
                report["rows"] = old["rows"]
            else:
                say(f"{path} is of another device, other versions or settings: begun anew")
        self._sum_up()

    def done(self, job: Row) -> bool:
        """Whether an earlier call measured it or found too little memory; other errors may pass."""
        if not self.go_on:
            return False
        found = [row for row in self.report["rows"] if self._key(row) == self._key(job)]
        return any(str(row.get("refused", NO_MEMORY)).startswith(NO_MEMORY) for row in found)

    def expected(self, job: Row) -> float:
        """Seconds, from the row most like it; a longer context costs with its square."""
        who, found = self.fields[1], []
        for row in self.report["rows"]:
            if "took_s" in row and "refused" not in row and row["shape"] == job["shape"]:
                ratio = job["context"] / row["context"]
                other = (row[who] != job[who], row["at"] != job["at"], abs(math.log(ratio)))
                found.append((*other, row["took_s"] * max(1.0, ratio) ** 2))
        return float(min(found)[-1]) if found else 0.0

    def fits(self, job: Row, before: float = 0.0) -> bool:
        """Whether it would end in time, `before` seconds of preparing included."""
        ends = time.monotonic() + before + self.expected(job)
        return ends < self.deadline

    def leave(self, *jobs: Row) -> None:
        """There is no time for them."""
        self.left += jobs

    @contextmanager
    def row(self, job: Row) -> Iterator[Row]:
        """Gives the row to fill; what goes wrong meanwhile is part of the result."""
        row, began = dict(job), time.monotonic()
        try:
            yield row
        except Exception as error:
            row["refused"] = refusal(error)
        row["took_s"] = round(time.monotonic() - began, 2)
        self.add(row)

    def add(self, row: Row) -> None:
        """In the place of an earlier one, and write."""
        row = row | {"date": date.today().isoformat()}
        key = self._key(row)
        made = (*key[:2], *[None] * (len(key) - 2))  # what told that it could not be made
        others = [one for one in self.report["rows"] if self._key(one) not in (key, made)]
        self.report["rows"] = [*others, row]
        self._sum_up()
        write(self.report, self.path)
        say(str(row))

    def finish(self, options: argparse.Namespace) -> None:
        """Say where the rows are; last, what is undone and the command that goes on."""
        say(f"wrote {self.path}: {len(self.report['rows'])} rows")
        if self.left:
            for job in self.left:
                say("no time for " + ", ".join(map(str, self._key(job))))
            say("go on with: " + self._command(options))

    def _command(self, options: argparse.Namespace) -> str:
        words = [self.report["command"], "--continue"]
        for name, value in vars(options).items():
            if name != "go_on":
                listed = value if isinstance(value, list) else [value]
                words += ["--" + name.replace("_", "-"), *map(str, listed)]
        return " ".join(words)

    def _sum_up(self) -> None:
        if self.times_faster is not None:
            self.report["times_faster"] = self.times_faster(self.report["rows"])

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(field) for field in self.fields)


def refusal(error: Exception) -> str:
    """Why a row could not be measured."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return f"{NO_MEMORY}: {str(error)[:200]}"
    return f"{type(error).__name__}: {str(error)[:300]}"
