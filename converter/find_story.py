"""The long story of one block, printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reattend.explain import Explanation
from reattend.found import STEPS

if TYPE_CHECKING:
    from rich.console import Console


def show_story(told: Explanation, out: Console) -> None:
    """Verdict, steps, what was read, the numbers of the proof, and the subgraph."""
    from rich.table import Table
    from rich.text import Text

    out.print(Text(told.path, style="bold"))
    out.print(Text(told.verdict))
    out.print(Text("\nSteps", style="dim"))
    for name, meaning in STEPS.items():
        mark = "✓" if name in told.passed else "✗" if name == told.failed else "·"
        out.print(Text(f"{mark} {name:<9} {meaning}"))
    if told.node:
        out.print(Text(f"\nWhere: node {told.node}"))
    if told.nearest:
        out.print(
            Text(f"{'Nearest understood form' if told.failed else 'In short'}: {told.nearest}")
        )
    if told.parts:
        out.print(Text("\nRead", style="dim"))
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in told.parts.items():
            table.add_row(Text(name), Text(text))
        out.print(table)
    _show_numbers(told, out)
    if told.rows:
        out.print(Text("\nSubgraph", style="dim"))
        table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))
        for head in ("Node", "Call", "From", "Value"):
            table.add_column(head, overflow="fold")
        for row in told.rows:
            style = "bold red" if row.name == told.node and told.failed else ""
            cells = (row.name, row.call, " ".join(row.inputs), row.shape)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        out.print(table)


def _show_numbers(told: Explanation, out: Console) -> None:
    from rich.text import Text

    numbers = told.numbers
    if numbers is None:
        return
    out.print(Text("\nSelf-check", style="dim"))
    if numbers.problem:
        out.print(Text(f"could not run: {numbers.problem}"))
        return
    out.print(
        Text(
            f"float64, random weights: relative difference {numbers.error:.1e} "
            f"(limit {numbers.limit:g})"
        )
    )
    out.print(
        Text(
            f"{numbers.dtype}, own weights: difference {numbers.native:.1e}, noise of summation "
            f"{numbers.floor:.1e}"
        )
    )
    if numbers.first is None:
        out.print(Text("first difference: none"))
    else:
        out.print(
            Text(
                f"first difference: output {list(numbers.first)} is {numbers.expected:.9g}, "
                f"rebuilt {numbers.got:.9g}"
            )
        )
