"""A table of a report as text cells, shared by Markdown and the page.

Columns that nobody filled are dropped, so that a run without recall shows no empty columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reattend.report.numbers import ABSENT


@dataclass(frozen=True)
class Column:
    """Head of a column; `code` cells are identifiers, `number` cells align right."""

    head: str
    kind: str = "text"
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """Caption, columns, rows of text.

    `marked` rows are the model that was published, `strong` cells (row, column) the best of theirs.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[int] = frozenset()
    strong: frozenset[tuple[int, int]] = frozenset()


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    marked: Iterable[int] = (),
) -> Table | None:
    """Build a table without its empty columns; None where there is no row."""
    listed = [tuple(row) for row in rows]
    if not listed:
        return None
    used = [i for i in range(len(columns)) if any(row[i] not in (ABSENT, "") for row in listed)]
    return Table(
        caption,
        tuple(columns[i] for i in used),
        tuple(tuple(row[i] for i in used) for row in listed),
        frozenset(marked),
    )
