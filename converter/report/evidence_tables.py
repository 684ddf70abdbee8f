"""The tables about evidence: quality, parity, gates, calibration, provenance."""

from __future__ import annotations

from reattend.report.evidence import ParityCheck, Quality, Verdict
from reattend.report.headline import MARKS, State
from reattend.report.model import Report
from reattend.report.numbers import ABSENT, fixed, percent, plain, plural, signed_percent, tiny
from reattend.report.table import Column, Table, table

VERDICT_STATE: dict[Verdict, State] = {"pass": "good", "fail": "bad", "not-run": "open"}
VERDICT_TEXT: dict[Verdict, str] = {"pass": "passed", "fail": "failed", "not-run": "not run"}


def verdict(value: Verdict) -> str:
    """`✓ passed`, `✗ failed`, `– not run`: a mark and a word, never colour alone."""
    return f"{MARKS[VERDICT_STATE[value]]} {VERDICT_TEXT[value]}"


def quality_table(quality: Quality) -> Table | None:
    """The measured models at their cache size."""
    tasks = quality.recall_tasks()
    columns = (
        Column("Model"),
        Column("Cache", "number", "bytes/token"),
        Column("Perplexity", "number"),
        Column("Change", "number"),
        Column("KL", "number", "nats/token"),
        Column("Same top token", "number"),
        *(Column(task.replace("_", "-").capitalize(), "number", "recall") for task in tasks),
    )
    original, published = quality.last("original"), quality.last("converted")
    base = original.ppl if original else None
    rows = [
        (
            row.name,
            plain(row.cache_bytes_per_token, 5),
            fixed(row.ppl, 3),
            signed_percent(row.ppl / base - 1)
            if base and row.ppl is not None and row is not original
            else ABSENT,
            plain(row.kl, 3),
            percent(row.top1),
            *(percent(row.recall.get(task)) for task in tasks),
        )
        for row in quality.rows
    ]
    facts = [
        quality.data,
        plural(quality.tokens, "token") if quality.tokens is not None else "",
        f"{quality.context:,} per sequence" if quality.context is not None else "",
    ]
    caption = "Measured"
    if any(facts):
        caption += " on " + ", ".join(fact for fact in facts if fact)
    marked = [i for i, row in enumerate(quality.rows) if row is published]
    return table(caption, columns, rows, marked)


def parity_table(report: Report) -> Table | None:
    """Every parity check with its tolerance and the noise floor."""
    columns = (
        Column("Check"),
        Column("Compared"),
        Column("Shape", "number"),
        Column("Max difference", "number"),
        Column("Relative", "number"),
        Column("Cosine", "number"),
        Column("Same top token", "number"),
        Column("Tolerance", "number"),
        Column("Noise floor", "number"),
        Column("Verdict"),
    )
    rows = [
        (
            c.name,
            c.compared,
            "×".join(str(n) for n in c.shape) or ABSENT,
            tiny(c.max_abs),
            tiny(c.relative),
            plain(c.cosine, 7),
            percent(c.top1),
            _tolerance(c),
            tiny(c.noise_floor),
            verdict(c.verdict),
        )
        for c in report.parity
    ]
    return table(
        "Numbers that must agree; the noise floor is what a different summation order changes",
        columns,
        rows,
    )


def _tolerance(check: ParityCheck) -> str:
    if check.judged_by == "relative" or check.tolerance is None:
        return tiny(check.tolerance)
    return f"{plain(check.tolerance)} on {check.judged_by.replace('_', ' ')}"


def gates_table(report: Report) -> Table | None:
    """The limits of the plan."""
    columns = (
        Column("Gate", "code"),
        Column("Measured", "number"),
        Column("Limit", "number"),
        Column("Verdict"),
        Column("Reason"),
    )
    signs = {"<=": "≤", ">=": "≥", "==": "="}
    rows = [
        (
            gate.name,
            plain(gate.value),
            f"{signs[gate.relation]} {plain(gate.limit)}" if gate.limit is not None else ABSENT,
            verdict(gate.verdict),
            gate.reason,
        )
        for gate in report.gates
    ]
    return table("Limits that the plan sets", columns, rows)


def calibration_table(report: Report) -> Table | None:
    """One row per stage."""
    columns = (
        Column("Stage"),
        Column("Tokens", "number"),
        Column("Loss is"),
        Column("First", "number"),
        Column("Last", "number"),
    )
    stages = report.calibration.stages if report.calibration else ()
    rows = [
        (
            stage.name,
            f"{stage.tokens:,}",
            stage.loss_name if stage.loss else ABSENT,
            plain(stage.loss[0][1]) if stage.loss else ABSENT,
            plain(stage.loss[-1][1]) if stage.loss else ABSENT,
        )
        for stage in stages
    ]
    return table("Loss of each stage", columns, rows)


def provenance_table(report: Report) -> Table | None:
    """Hashes, seeds and versions."""
    p = report.provenance
    rows = [("reattend", "version", report.reattend_version)]
    if report.model.source_hash:
        rows.append(("source model", "hash", report.model.source_hash))
    rows += [("weights", name, value) for name, value in sorted(p.weights.items())]
    rows += [("plan", "hash", p.plan)] if p.plan else []
    rows += [("data", name, value) for name, value in sorted(p.data.items())]
    rows += [("seed", name, str(value)) for name, value in sorted(p.seeds.items())]
    rows += [
        ("version", name, value)
        for name, value in sorted(p.versions.items())
        if (name, value) != ("reattend", report.reattend_version)
    ]
    return table(
        "What went in, by content", (Column("Of"), Column("What"), Column("Value", "code")), rows
    )
