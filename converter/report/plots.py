"""The plots of a report: cache bytes, error per layer, energy per rank, use of heads, loss.

Each function reads the report and returns a `Plot`, or None where there is nothing to show.
Blue is the converted model and orange the original throughout (colour-blind safe), and every
line or bar also carries its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reattend.report import svg
from reattend.report.model import Report
from reattend.report.numbers import percent, plain, share, size, tiny
from reattend.report.site import SiteEntry

#: bars for them in the plot of caches
YARDSTICKS = 8


@dataclass(frozen=True)
class Plot:
    """A drawn plot with its heading and the sentence below it."""

    name: str
    title: str
    caption: str
    svg: str


def all_plots(report: Report) -> dict[str, Plot]:
    """Every plot that the report has data for, by name; empty without matplotlib."""
    if not svg.available():
        return {}
    drawn = (_cache(report), _error(report), _energy(report), _heads(report), _loss(report))
    return {plot.name: plot for plot in drawn if plot is not None}


def _plot(
    name: str,
    title: str,
    caption: str,
    paint: Callable[[Any], None],
    dimensions: tuple[float, float] = (460, 270),
) -> Plot:
    return Plot(name, title, caption, svg.draw(f"plot-{name}", title, caption, paint, dimensions))


def _cache(report: Report) -> Plot | None:
    """Cache bytes per token: original, converted, and yardsticks of the quality table, of many
    those nearest to it.
    """
    totals = report.totals
    before, after = totals.cache_bytes_per_token_before, totals.cache_bytes_per_token_after
    if before is None or after is None:
        return None
    bars = [("original", before, svg.BEFORE), ("converted", after, svg.AFTER)]
    sticks = [
        (row.name, row.cache_bytes_per_token)
        for row in (report.quality.rows if report.quality else ())
        if row.role == "yardstick" and row.cache_bytes_per_token is not None
    ]
    near = sorted(abs(held - after) for _, held in sticks)[:YARDSTICKS]
    for name, held in sticks:
        if abs(held - after) in near and len(bars) < 2 + YARDSTICKS:
            bars.append((_short(name, 30), held, svg.THIRD))

    def paint(axes: Any) -> None:
        places = list(range(len(bars)))
        widths = [value for _, value, _ in bars]
        axes.barh(places, widths, color=[colour for _, _, colour in bars], height=0.56)
        axes.set_yticks(places, [name for name, _, _ in bars], color=svg.TEXT)
        axes.invert_yaxis()
        axes.set_xlim(0, max(widths) * 1.2 or 1)
        axes.set_ylim(len(bars) - 0.45, -0.55)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
        for place, value in zip(places, widths, strict=True):
            axes.annotate(
                size(value), (value, place), (5, 0), textcoords="offset points", va="center"
            )

    caption = f"{size(before)} per token before, {size(after)} after, all layers, batch 1."
    height = 46 + 34 * len(bars)
    return _plot("cache", "Cache bytes per token", caption, paint, (460, max(height, 110)))


def _error(report: Report) -> Plot | None:
    """Relative attention output error of each converted site, in model order."""
    sites = [
        (site, site.error.output_relative)
        for site in report.sites
        if site.error is not None and _finite(site.error.output_relative)
    ]
    values = [value for _, value in sites if value is not None]
    if not values:
        return None
    positive = [value for value in values if value > 0]
    logarithmic = bool(positive) and max(positive) > 50 * min(positive)
    worst = max(range(len(values)), key=values.__getitem__)

    def paint(axes: Any) -> None:
        places = list(range(len(values)))
        if logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(min(positive) / 2, max(positive) * 3)
        else:
            axes.set_ylim(0, (max(values) or 1) * 1.18)
        axes.vlines(places, axes.get_ylim()[0], values, color=svg.AFTER, linewidth=1.4)
        axes.plot(places, values, "o", color=svg.AFTER, markersize=6, clip_on=False)
        axes.annotate(
            share(values[worst]),
            (worst, values[worst]),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
        axes.set_xlim(-0.6, len(values) - 0.4)
        step = max(1, math.ceil(len(places) / 12))
        layers = _layers([site for site, _ in sites])
        axes.set_xticks(places[::step], layers[::step])
        axes.set_xlabel("layer" if sites[0][0].layer is not None else "site, in model order")
        axes.yaxis.set_major_locator(_few_ticks(logarithmic))
        axes.yaxis.set_major_formatter(lambda value, _: _share_tick(value))

    caption = (
        f"Largest at {sites[worst][0].label}: {share(values[worst])}. Norm of the difference "
        "in attention output over the norm of the original output."
    )
    return _plot("error", "Output error by layer", caption, paint)


def _energy(report: Report) -> Plot | None:
    """Share of the energy kept, by rank; one line per site, the chosen rank marked."""
    sites = [
        (site, site.error)
        for site in report.sites
        if site.error is not None and len(site.error.energy_kept) > 1
    ]
    if not sites:
        return None
    marks = [
        (error.rank, error.energy_kept[error.rank - 1])
        for _, error in sites
        if error.rank and error.rank <= len(error.energy_kept)
    ]
    order = sorted(
        range(len(sites)), key=lambda i: sum(sites[i][1].energy_kept) / len(sites[i][1].energy_kept)
    )
    named = {order[0]: "least", order[-1]: "most"} if len(sites) > 1 else {0: "only"}

    def paint(axes: Any) -> None:
        for index, (site, error) in enumerate(sites):
            curve = (0.0, *error.energy_kept)
            label = named.get(index)
            axes.plot(
                range(len(curve)),
                curve,
                color=svg.AFTER if label else svg.SOFT,
                linewidth=1.8 if label else 0.8,
                linestyle="--" if label == "least" else "-",
                alpha=1.0 if label else 0.6,
                label=site.label if label else None,
            )
        for rank, kept in sorted(set(marks)):
            axes.plot([rank], [kept], "o", color=svg.BEFORE, markersize=4.5, zorder=5)
        if marks:
            axes.plot([], [], "o", color=svg.BEFORE, markersize=4.5, label="rank kept")
        axes.set_xlim(0, max(len(error.energy_kept) for _, error in sites))
        axes.set_ylim(0, 1.03)
        axes.set_xlabel("rank")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
        axes.legend(loc="lower right", frameon=False, fontsize=10, handlelength=1.8)

    kept = [value for _, value in marks]
    caption = "Energy of keys and values inside the best subspace of each rank, one line per layer."
    if kept:
        low, high = percent(min(kept)), percent(max(kept))
        spread = low if low == high else f"{low} to {high}"
        caption = f"The rank kept holds {spread} of the energy. " + caption
    return _plot("energy", "Energy kept by rank", caption, paint)


def _heads(report: Report) -> Plot | None:
    """Share of tokens that use each routed head; a line where all would be used alike."""
    sites = [site for site in report.sites if site.head_use]
    if not sites:
        return None
    shares = [share for site in sites for share in site.head_use]
    even = [sum(site.head_use) / len(site.head_use) for site in sites]

    def paint(axes: Any) -> None:
        for place, site in enumerate(sites):
            axes.plot([place] * len(site.head_use), site.head_use, "o", color=svg.AFTER, alpha=0.7)
        axes.plot(range(len(even)), even, "_", color=svg.BEFORE, markersize=16, label="if even")
        axes.set_xlim(-0.6, len(sites) - 0.4)
        axes.set_ylim(-0.03, 1.03)
        step = max(1, math.ceil(len(sites) / 12))
        axes.set_xticks(list(range(len(sites)))[::step], _layers(sites)[::step])
        axes.set_xlabel("layer" if sites[0].layer is not None else "site, in model order")
        axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
        axes.legend(loc="upper right", frameon=False, fontsize=10, handlelength=1.8)

    caption = (
        f"Share of held-out tokens that use each routed head or KV group: the busiest "
        f"{percent(max(shares), 0)}, the idlest {percent(min(shares), 0)}, evenly spread "
        f"{percent(sum(even) / len(even), 0)} on average."
    )
    return _plot("heads", "Tokens per head", caption, paint)


def _loss(report: Report) -> Plot | None:
    """Loss of each training stage over the tokens it has seen."""
    stages = [
        (stage, [(x, y) for x, y in stage.loss if _finite(y)])
        for stage in (report.calibration.stages if report.calibration else ())
    ]
    stages = [(stage, points) for stage, points in stages if len(points) > 1]
    if not stages:
        return None
    names = list(dict.fromkeys(stage.loss_name for stage, _ in stages))
    ends = "; ".join(
        f"{stage.name} {plain(points[0][1], 3)} → {plain(points[-1][1], 3)} ({stage.loss_name})"
        for stage, points in stages
    )
    relative = len(names) > 1 and all(points[0][1] > 0 for _, points in stages)
    if relative:
        stages = [(s, [(x, y / points[0][1]) for x, y in points]) for s, points in stages]
    values = [y for _, points in stages for _, y in points]
    logarithmic = min(values) > 0 and max(values) > 20 * min(values)
    styles = ((svg.AFTER, "-"), (svg.BEFORE, "--"), (svg.THIRD, ":"), (svg.TEXT, "-."))

    def paint(axes: Any) -> None:
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_few_ticks(True))
        for index, (stage, points) in enumerate(stages):
            colour, line = styles[index % len(styles)]
            axes.plot(
                *zip(*points, strict=True), line, color=colour, linewidth=1.8, label=stage.name
            )
        axes.set_xlim(0, None)
        if not logarithmic:
            axes.set_ylim(min(0.0, *values), max(values) * 1.06 or 1)
        axes.set_xlabel("tokens seen")
        axes.xaxis.set_major_locator(_few_ticks(False))
        axes.xaxis.set_major_formatter(lambda value, _: _tokens(value))
        axes.yaxis.set_major_formatter(
            lambda value, _: percent(value, 0) if relative else plain(value, 3)
        )
        axes.legend(loc="upper right", frameon=False, fontsize=10, handlelength=1.8)

    caption = f"{ends}."
    if relative:
        caption = "Each loss as a share of its first value. " + caption
    return _plot("loss", "Calibration loss", caption, paint)


def _few_ticks(logarithmic: bool) -> Any:
    from matplotlib.ticker import LogLocator, MaxNLocator

    return LogLocator(numticks=5) if logarithmic else MaxNLocator(nbins=5)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _share_tick(value: float) -> str:
    return f"{value * 100:.3g} %" if value >= 1e-4 or value == 0 else tiny(value)


def _tokens(value: float) -> str:
    return (
        f"{value / 1e6:g} M"
        if value >= 1e6
        else f"{value / 1e3:g} K"
        if value >= 1e3
        else f"{value:g}"
    )


def _layers(sites: list[SiteEntry]) -> list[str]:
    """Tick labels: layer numbers, or places where a site has none."""
    return [str(site.layer if site.layer is not None else i) for i, site in enumerate(sites)]


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
