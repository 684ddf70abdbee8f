"""The report as one self-contained HTML page.

No script, no outside request: a content security policy in the page forbids both, so that the
page stays harmless even if it is opened from an untrusted folder. The bytes depend on the
report, and on whether and which matplotlib is installed.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from reattend.report import evidence_tables, site_tables, svg
from reattend.report.headline import MARKS, headline
from reattend.report.model import Report
from reattend.report.part import dumps
from reattend.report.peer_table import peers_table
from reattend.report.plots import all_plots


def to_html(report: Report) -> str:
    """Render `report`; ends in one newline."""
    top = headline(report)
    shown: dict[str, Any] = {
        "report": report,
        "top": top,
        "marks": MARKS,
        "plots": all_plots(report),
        "has_matplotlib": svg.available(),
        "gates": evidence_tables.gates_table(report),
        "sites": site_tables.sites_table(report),
        "cost": site_tables.cost_table(report),
        "quality": evidence_tables.quality_table(report.quality) if report.quality else None,
        "peers": peers_table(report.quality) if report.quality else None,
        "parity": evidence_tables.parity_table(report),
        "calibration": evidence_tables.calibration_table(report),
        "every_site": site_tables.all_sites_table(report),
        "provenance": evidence_tables.provenance_table(report),
        "plan": dumps(report.plan).rstrip() if report.plan else "",
        "lacking": site_tables.lacking(report),
    }
    return _template().render(shown).rstrip() + "\n"


def unbroken(text: str) -> str:
    """Keep a number and its unit on one line."""
    return re.sub(r"(?<=\d) (?=%|B\b|[KMGT]\b|[KMGT]iB\b)", "\u00a0", text)


def breakable(text: str) -> Markup:
    """Escape an identifier and let it break after a dot, slash, dash or underscore."""
    return Markup(re.sub(r"([./_-])(?=\w)", r"\1<wbr>", str(escape(text))))


@cache
def _template() -> Template:
    folder = files("reattend.report")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
    )
    environment.filters.update(unbroken=unbroken, breakable=breakable)
    return environment.get_template("page.html.j2")
