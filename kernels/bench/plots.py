"""Plots of the GPU results: time against length and against density, one per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from goals import Row, fastest

from reattend.report import svg

Lines = dict[str, list[tuple[float, float]]]
#: what stands for the page's colours in a file of its own, readable on light and on dark
COLOURS = {
    "var(--ink)": "#808080", "var(--soft)": "#808080", "var(--rule)": "#b0b0b0",
    "var(--before)": "#c8641e", "var(--after)": "#1f6fb4", "var(--third)": "#5d9b4e",
    "var(--paper)": "none",
}  # fmt: skip
SIZE = (560, 320)


def of_op(rows: list[Row], op: str, **shape: int) -> list[Row]:
    """The timed rows of an op with these sizes, in bf16, of caches without pages."""
    wanted = {"page": 0} | shape
    return [
        row
        for row in rows
        if row["op"] == op
        and "ms" in row
        and row.get("dtype", "bfloat16") == "bfloat16"
        and all(row["shape"].get(key, 0) == value for key, value in wanted.items())
    ]


def against(rows: list[Row], at: Callable[[Row], float], names: dict[str, str]) -> Lines:
    """Points of ours, of the floor and of peers (label: ending of the name), ascending."""
    rows = sorted(rows, key=at)
    lines: Lines = {
        "ours": [(at(row), row["ms"]) for row in rows],
        "floor": [(at(row), row["floor_ms"]) for row in rows],
    }
    for label, ending in names.items():
        points = [(at(row), peer["ms"]) for row in rows if (peer := fastest(row, ending))]
        if points:
            lines[label] = points
    return lines


def families(rows: list[Row]) -> dict[str, tuple[str, str, Lines]]:
    """Name: title, label of the axis, lines."""

    def length(row: Row) -> float:
        return float(row["shape"]["m"])

    def density(row: Row) -> float:
        return float(100 * row["density"])

    latent = of_op(rows, "latent_attention", b=8, h=16, n=1, d=512)
    originals = {"original MHA": "original MHA", "8 KV heads": "original 8 KV heads"}
    sparse = of_op(rows, "sparse_attention", n=16384)
    window = [r for r in of_op(rows, "sparse_attention", b=1) if "sinks" in r["case"]]
    flash = {"flash, dense": "flash", "flex": "flex"}
    routed = of_op(rows, "routed_attention", n=16384) + of_op(rows, "routed_attention", n=4096)
    half = [row for row in routed if row.get("share") == 0.5]
    linear = [r for r in of_op(rows, "linear_attention") if "decay per head" in r["case"]]
    linear = [row for row in linear if row["shape"]["n"] > 1]
    prefill = [r for r in of_op(rows, "attention", h=32, g=8, d=128) if r["shape"]["n"] > 512]
    return {
        "latent-decode": (
            "Latent decode, batch 8, 16 heads", "rows", against(latent, length, originals)
        ),
        "attention": (
            "Attention, prefill", "tokens",
            against(prefill, length, {"flash": "flash", "cudnn": "cudnn"}),
        ),
        "sparse-density": (
            "Sparse prefill of 16k tokens", "% of blocks", against(sparse, density, flash)
        ),
        "sparse-length": (
            "Sinks and a window of 1k, prefill", "tokens", against(window, length, flash)
        ),
        "routed": (
            "Half of the KV groups, prefill", "tokens",
            against(half, length, {"ours, all heads": "all heads"}),
        ),
        "linear": (
            "Linear attention, decay per head", "tokens", against(linear, length, {"fla": "fla"})
        ),
    }  # fmt: skip


def draw(name: str, title: str, axis: str, lines: Lines, device: str) -> str:
    """One plot with logarithmic axes, as SVG that stands by itself."""
    colours = {"ours": svg.AFTER, "floor": svg.SOFT}
    others = [label for label in lines if label not in colours]
    colours |= {label: (svg.BEFORE, svg.THIRD)[i % 2] for i, label in enumerate(others)}

    def paint(axes: Any) -> None:
        for label, points in lines.items():
            style = "--" if label == "floor" else "-"
            axes.plot(*zip(*points, strict=True), style, color=colours[label], marker="o", ms=3)
            axes.annotate(
                label, points[-1], (5, 0), textcoords="offset points", color=colours[label]
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.margins(x=0.2)
        axes.set_title(f"{title} ({device})", color=svg.TEXT, fontsize=12, loc="left")
        axes.set_xlabel(axis)
        axes.set_ylabel("ms")

    ends = [f"{label} {points[-1][1]:.3g} ms" for label, points in lines.items()]
    told = f"At {lines['ours'][-1][0]:g} {axis}: {', '.join(ends)}."
    made = svg.draw(f"bench-{name}", title, told, paint, SIZE)
    for variable, colour in COLOURS.items():
        made = made.replace(variable, colour)
    return made.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def all_plots(rows: list[Row], device: str) -> dict[str, str]:
    """SVG by name, of the families with two points or more."""
    return {
        name: draw(name, title, axis, lines, device)
        for name, (title, axis, lines) in families(rows).items()
        if len(lines["ours"]) > 1
    }
