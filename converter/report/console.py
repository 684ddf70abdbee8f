"""The report for the console: the headline, one row per group of sites, what did not pass.

User strings are `Text`, never rich markup, so a path such as `[red]` prints as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from reattend.report.headline import MARKS, State, headline
from reattend.report.model import Report
from reattend.report.site_tables import lacking, sites_table

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES: dict[State, str] = {"good": "green", "bad": "bold red", "open": "default"}
COLUMNS = ("Sites", "Attention", "Done", "Options or reason", "Cache", "Output error")


def summary(report: Report) -> RenderableType:
    """A rich renderable: headline, facts, folded sites, failed checks, notes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    top = headline(report)
    facts = Table.grid(padding=(0, 2))
    for fact in top.facts:
        style = STYLES[fact.state]
        facts.add_row(
            Text(MARKS[fact.state], style=style),
            Text(fact.label, style="dim"),
            Text(fact.figure, style=f"bold {style}" if style != "default" else "bold"),
            Text(fact.detail),
        )
    parts: list[RenderableType] = [Text(top.title, style="bold"), Text(top.sentence), Text(), facts]
    sites = sites_table(report)
    if sites is not None:
        grid = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), title_justify="left")
        shown = [i for i, column in enumerate(sites.columns) if column.head in COLUMNS]
        for i in shown:
            column = sites.columns[i]
            head = Text(column.head)
            if column.unit:
                head.append("\n" + column.unit.replace(", ", ",\n"))
            grid.add_column(
                head,
                justify="right" if column.kind == "number" else "left",
                no_wrap=column.kind == "number" or column.head == "Done",
                overflow="fold",
                min_width=_longest_word(row[i] for row in sites.rows),
            )
        for row in sites.rows:
            grid.add_row(*(Text(row[i]) for i in shown))
        parts += [Text(), grid]
    failed = [
        *(
            f"gate {gate.name}: {gate.reason}".rstrip(": ")
            for gate in report.gates
            if gate.verdict == "fail"
        ),
        *(
            f"parity {check.name}: {check.compared}"
            for check in report.parity
            if check.verdict == "fail"
        ),
    ]
    if failed:
        parts.append(Text())
        parts += [Text(f"{MARKS['bad']} {line}", style=STYLES["bad"]) for line in failed]
    notes = [*report.notes, *(" ".join(line) for line in lacking(report))]
    if notes:
        parts.append(Text())
        parts += [Text(f"note: {note}", style="dim") for note in notes]
    return Group(*parts)


def _longest_word(cells: Iterable[str]) -> int:
    """Width that keeps names whole on a narrow terminal (long paths may still fold)."""
    return min(24, max((len(word) for cell in cells for word in cell.split()), default=1))
