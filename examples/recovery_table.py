"""Recovery curves as Markdown: what `recovery.py` measured, and the students it measures."""

from __future__ import annotations

from typing import Any

#: name -> preset and the share of the original cache; None: the dense model itself
STUDENTS: dict[str, tuple[str, float] | None] = {
    "dense": None,
    **{
        f"{preset}, {100 * share:g} %": (preset, share)
        for share in (0.5, 0.25, 0.125)
        for preset in ("transmla", "transmla-paper")
    },
}
#: what is trained on: the distance to the original, or TransMLA's loss
LOSSES = ("distill", "lm")
SEQ_LEN, RECALL_LEN, STATISTICS = 256, 512, 32_768
#: the row by which the learning rate of `lm` is chosen, and how many calibration rows it is held
#: against
RATE_ROW, RATE_ROWS = ("transmla, 25 %", 50_000, "lm"), 24


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: one line per student, one column per budget."""
    rows = {  # files of before 2026-11-21 know one loss
        (row["student"], row.get("loss", LOSSES[0]), row["tokens"]): row for row in results["rows"]
    }
    if len(rows) < len(results["rows"]):
        raise ValueError("two rows of one student, one loss and one budget")
    budgets = sorted({tokens for *_, tokens in rows})
    heads = [f"{tokens:,} tokens" for tokens in budgets]
    lines = [
        f"| student | trained on | cache, numbers/token/layer | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(budgets)}",
    ]
    for student, loss in [(student, loss) for student in STUDENTS for loss in LOSSES]:
        # untrained, a student is the same under both losses
        found = [rows.get((student, loss if n else LOSSES[0], n)) for n in budgets]
        if any(row for row, n in zip(found, budgets, strict=True) if n):
            cache = next(row["cache"] for row in found if row)
            cells = " | ".join(_cell(row) for row in found)
            lines.append(f"| {student} | {loss} | {cache} | {cells} |")
    inputs = results["inputs"]
    far = inputs.get("far", {})
    stages = ", ".join(
        f"{n} {100 * share:g} % at lr {inputs['lr'][n]:g}"
        + (f" (less where the first loss is below {far[n]:g})" if far else "")
        for n, share in inputs["share"].items()
    )
    baseline = ""
    if "rates" in results:
        student, tokens, _ = RATE_ROW
        tried = ", ".join(f"{ppl:.2f} at {rate}" for rate, ppl in results["rates"].items())
        baseline = (
            f"lm: the next-token loss alone, end to end at lr {best_rate(results['rates']):g}, the "
            f"same parameters trained; the rate chosen by perplexity on {RATE_ROWS} rows of the "
            f"calibration text held back from {student} at {tokens:,} tokens ({tried}). "
        )
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}. Each cell: held-out "
        f"perplexity (KL to the original in nats per token; copy recall right), "
        f"{inputs['rows']} x {SEQ_LEN} tokens; copy: {inputs.get('copy_rows', inputs['rows'])} x "
        f"{RECALL_LEN}. Training text: "
        f"calibration.txt, never the held-out one. distill: {stages}. The dense model then stays "
        f"where it is: the loss is the distance to the original, so the text itself teaches "
        f"nothing. {baseline}{_worse(rows)}0 tokens is the conversion alone, from statistics over "
        f"{STATISTICS:,} tokens in the checkpoint's dtype; the table of presets has its own "
        f"statistics, hence slightly other numbers. {_missing(lines)}"
        f"Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def best_rate(rates: dict[str, float]) -> float:
    """The learning rate with the least perplexity."""
    return float(min(rates, key=lambda rate: rates[rate]))


def _missing(lines: list[str]) -> str:
    return "-: not measured. " if any(" - |" in line for line in lines) else ""


def _worse(rows: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """The students that a training left worse than it found them."""
    cells = []
    for (student, loss, tokens), row in rows.items():
        start = rows.get((student, LOSSES[0], 0))
        if tokens and start:
            before, after = (found["quality"]["perplexity"] for found in (start, row))
            if round(after, 2) > round(before, 2):
                cells.append(
                    f"{student} ({loss}) from {before:.2f} to {after:.2f} after {tokens:,} tokens"
                )
    return f"Training can also lose: {'; '.join(cells)}. " if cells else ""


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    quality = row["quality"]  # nested: it has a `tokens` of its own, those that were scored
    copied = 100 * quality["recall"]["copy"]["accuracy"]
    return f"{quality['perplexity']:.2f} ({quality['kl']:.3f}; {copied:.0f} %)"
