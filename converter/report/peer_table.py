"""The table of presets by sizes: perplexity and recall of every cell, the best of each column."""

from __future__ import annotations

from collections.abc import Iterable

from reattend.report.evidence import PeerCell, Quality, QualityRow
from reattend.report.numbers import ABSENT, fixed, percent, plural
from reattend.report.table import Column, Table

OURS, PUBLISHED = "transmla", "transmla-paper"


def peers_table(quality: Quality) -> Table | None:
    """One row per preset, one column per size; None where no preset was asked for at a size."""
    if not quality.peers:
        return None
    found = {(cell.preset, cell.size): cell for cell in quality.peers}
    presets, sizes = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    best = {size: _lowest(found[p, size] for p in presets if (p, size) in found) for size in sizes}
    rows = [(p, *(_shown(found.get((p, size))) for size in sizes)) for p in presets]
    strong = [
        (presets.index(cell.preset), 1 + sizes.index(cell.size)) for cell in best.values() if cell
    ]
    columns = (Column("Preset", "code"), *(Column(size, "number") for size in sizes))
    return Table(_caption(quality, best), columns, tuple(rows), strong=frozenset(strong))


def _lowest(cells: Iterable[PeerCell]) -> PeerCell | None:
    """The cell of lowest perplexity."""
    measured = [cell for cell in cells if cell.row is not None]
    return min(measured, key=_perplexity, default=None)


def _perplexity(cell: PeerCell) -> float:
    return float("inf") if cell.row is None or cell.row.ppl is None else cell.row.ppl


def _shown(cell: PeerCell | None) -> str:
    if cell is None:
        return ABSENT
    return "refused" if cell.row is None else _numbers(cell.row)


def _numbers(row: QualityRow) -> str:
    """`29.37 (60 %; 4.6)`, or the perplexity alone where recall was not measured."""
    if "copy" not in row.recall:
        return fixed(row.ppl)
    gain = row.gain["passkey"]
    return f"{fixed(row.ppl)} ({percent(row.recall['copy'], 0)}; {_signed(gain, 1)})"


def _signed(value: float, decimals: int) -> str:
    """Without the sign of a number that rounds to zero."""
    return fixed(0.0 if round(value, decimals) == 0 else value, decimals)


def _caption(quality: Quality, best: dict[str, PeerCell | None]) -> str:
    """What the numbers are, what they were measured on, and what they show."""
    original = quality.last("original")
    said = ["Perplexity without training"]
    if original is not None:
        if original.recall:
            said[0] += (
                " (share of a repeated passage that is copied right; nats per token that a key is "
                "easier for having been seen before)"
            )
        said.append(f"Original: {_numbers(original)}")
    said.append("Bold: the lowest perplexity of a column")
    found = {(cell.preset, cell.size): cell.row for cell in quality.peers if cell.row is not None}
    if original is not None and (ratios := _ratios(found, original)):
        above = f"Perplexity above the original's, {PUBLISHED} over {OURS}"
        said.append(f"{above}: {', '.join(ratios)}")
    if more := _recalled_better(quality, best):
        said.append(f"Recall above that of the bold cell: {'; '.join(more)}")
    if any(c.refused for c in quality.peers):
        said.append(f"Refused: {'; '.join(_refused(quality.peers))}")
    said.append(
        "Share of the cache: all converted layers together; of the rotary pairs: everything else "
        "kept"
    )
    facts = [quality.data]
    if quality.tokens is not None and quality.context is not None:
        facts.append(f"{plural(quality.tokens, 'token')}, {quality.context:,} per sequence")
    if quality.recall_data:
        facts.append(f"recall: {quality.recall_data}")
    said.append(f"Measured on {'; '.join(facts)}")
    return ". ".join(said) + "."


def _ratios(found: dict[tuple[str, str], QualityRow], original: QualityRow) -> list[str]:
    """By size, the excess of the published method over that of ours."""
    sizes = dict.fromkeys(size for _, size in found)
    ratios = []
    for size in sizes:
        ours, paper = (found.get((preset, size)) for preset in (OURS, PUBLISHED))
        if ours is None or paper is None:
            continue
        less, more = ((row.ppl or 0.0) - (original.ppl or 0.0) for row in (ours, paper))
        ratios.append(f"{size}: {more / less:.1f}" if less > 0 else f"{size}: {OURS} adds nothing")
    return ratios


def _recalled_better(quality: Quality, best: dict[str, PeerCell | None]) -> list[str]:
    """Every preset and size whose recall is above that of the column's lowest perplexity.

    What is equal as far as it is shown is equal.
    """
    found: dict[str, list[str]] = {}
    for cell in quality.peers:
        top = best[cell.size]
        if cell.row is None or top is None or top.row is None or top is cell:
            continue
        both = (cell.row, top.row)
        copied = [percent(row.recall.get("copy")) for row in both]
        gained = [_signed(row.gain.get("passkey", 0.0), 2) for row in both]
        more = []
        if copied[0] != copied[1] and both[0].recall["copy"] > both[1].recall["copy"]:
            more.append(f"copied right {copied[0]} for {copied[1]}")
        if gained[0] != gained[1] and both[0].gain["passkey"] > both[1].gain["passkey"]:
            more.append(f"key {gained[0]} for {gained[1]} nats")
        if more:
            found.setdefault(cell.preset, []).append(f"{cell.size} ({', '.join(more)})")
    return [f"{preset} at {', '.join(sizes)}" for preset, sizes in found.items()]


def _refused(cells: Iterable[PeerCell]) -> list[str]:
    """Every reason with the preset and the sizes it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.refused:
            found.setdefault((cell.preset, cell.refused), []).append(cell.size)
    return [f"{preset} at {', '.join(sizes)} ({why})" for (preset, why), sizes in found.items()]
