"""The report as GitHub Markdown: the same tables as the page, without plots.

Everything a model, a plan or a file name could bring in is escaped: text cells cannot start
markup, open HTML or end a table row, and identifiers are code spans fenced longer than any run
of backticks inside them.
"""

from __future__ import annotations

import re

from reattend.report import evidence_tables, site_tables
from reattend.report.headline import MARKS, headline
from reattend.report.model import Report
from reattend.report.part import dumps
from reattend.report.peer_table import peers_table
from reattend.report.table import Table

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def text(value: str) -> str:
    """Escape one line of user text for Markdown."""
    line = " ".join(value.split())
    line = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", line)
    line = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)
    line = re.sub(r"^([-+]|\d+[.)])(?=\s)", r"\\\1", line)
    return re.sub(r"[&<>]", lambda found: _ENTITIES[found.group()], line)


def code(value: str) -> str:
    """`value` as a code span that is safe inside a table row.

    A backslash or bar cannot be written both in a code span and in a table row; such a value
    becomes escaped text.
    """
    line = " ".join(value.split())
    if not line or "|" in line or "\\" in line:
        return text(line)
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def to_markdown(report: Report) -> str:
    """Render `report`; ends in one newline."""
    top = headline(report)
    lines = [f"# reattend report: {text(top.title)}", "", text(top.sentence), ""]
    lines += ["| | | |", "|---|---:|---|"]
    for fact in top.facts:
        label = f"{MARKS[fact.state]} {text(fact.label)}"
        lines.append(_row([label, f"**{text(fact.figure)}**", text(fact.detail)]))
    lines.append("")
    for note in report.notes:
        lines += [f"> {text(note)}", ""]
    for path, lacks in site_tables.lacking(report):
        lines += [f"> {code(path)} {text(lacks)}", ""]
    calibration = report.calibration
    sections = (
        ("Quality", evidence_tables.quality_table(report.quality) if report.quality else None),
        ("Presets beside it", peers_table(report.quality) if report.quality else None),
        ("Gates", evidence_tables.gates_table(report)),
        ("What was done", site_tables.sites_table(report)),
        ("Cost", site_tables.cost_table(report)),
        ("Calibration", evidence_tables.calibration_table(report)),
        ("Parity", evidence_tables.parity_table(report)),
        ("Every site", site_tables.all_sites_table(report)),
        ("Provenance", evidence_tables.provenance_table(report)),
    )
    for title, table in sections:
        if table is None:
            continue
        lines += [f"## {title}", ""]
        if title == "Calibration" and calibration is not None:
            for line in (calibration.data and f"Data: {calibration.data}", calibration.note):
                lines += [text(line), ""] if line else []
        lines += [*_table(table), ""]
    if report.plan:
        lines += ["## Plan", "", *_block(dumps(report.plan).rstrip()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Table) -> list[str]:
    return [f"*{text(table.caption)}*", "", *grid(table)]


def grid(table: Table) -> list[str]:
    """The lines of a table without its caption."""
    heads = [text(c.head + (f" ({c.unit})" if c.unit else "")) for c in table.columns]
    rules = ["---:" if c.kind == "number" else "---" for c in table.columns]
    lines = [_row(heads), "|" + "|".join(rules) + "|"]
    for index, row in enumerate(table.rows):
        cells = [
            code(cell) if column.kind == "code" else text(cell)
            for cell, column in zip(row, table.columns, strict=True)
        ]
        if index in table.marked:
            cells[0] = f"**{cells[0]}**"
        for column in range(len(cells)):
            if (index, column) in table.strong:
                cells[column] = f"**{cells[column]}**"
        lines.append(_row(cells))
    return lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _block(body: str) -> list[str]:
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", body)), default=0) + 1)
    return [f"{fence}json", body, fence]
