"""One matplotlib figure as an SVG element that lives inside an HTML page.

matplotlib writes a whole document: XML head, a DTD by URL, metadata with a date, a style rule
for `*`, identifiers that repeat from figure to figure, and fixed colours. In a page all of that
is wrong, so it is taken out here: what is left has no date, no outside reference, unique
identifiers, a title and a description, and colours that follow the page's light or dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from importlib.util import find_spec
from typing import Any

INK = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--rule)",
    "#040404": "var(--before)",
    "#050505": "var(--after)",
    "#060606": "var(--third)",
    "#070707": "var(--paper)",
}
"""Stand-in colours given to matplotlib, and the page's variable each becomes."""

TEXT, SOFT, RULE, BEFORE, AFTER, THIRD, PAPER = INK

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11.5,
    "text.color": TEXT,
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def available() -> bool:
    """Whether matplotlib (extra `plots`) is installed."""
    return find_spec("matplotlib") is not None


def draw(
    name: str,
    title: str,
    description: str,
    paint: Callable[[Any], None],
    size: tuple[float, float] = (460, 270),
) -> str:
    """Draw one plot.

    Args:
        name: identifier of the plot in the page; unique, letters and dashes.
        title: what it shows, for the accessible name.
        description: the finding in words, for readers who do not see the plot.
        paint: draws into the axes it is given, in the stand-in colours of `INK`.
        size: width and height in CSS pixels.

    Returns:
        `<svg>...</svg>`, the same bytes for the same drawing and matplotlib version.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _embed(out.getvalue(), name, title, description)


def _embed(document: str, name: str, title: str, description: str) -> str:
    body = document[document.index("<svg") :]
    box = re.search(r'viewBox="([^"]*)"', body)
    body = body[body.index(">") + 1 :].strip()
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style\b.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*</defs>", "", body)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for stand_in, variable in INK.items():
        body = body.replace(stand_in, variable)
    body = re.sub(r"\n\s*", "\n", body)
    head = (
        f'<svg viewBox="{box[1] if box else "0 0 460 270"}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>\n'
    )
    return head + body
