"""Quality rows of the original and the converted model, and the plan's gates over them."""

from __future__ import annotations

from typing import Any

from torch import nn

from reattend.errors import GateError
from reattend.materials import Materials
from reattend.plan import Verify
from reattend.preflight import Choice
from reattend.report.evidence import Gate, ParityCheck, QualityRow
from reattend.source import Source
from reattend.verify.quality import Quality, measure
from reattend.verify.recall import enough


def measured_rows(
    source: Source, converted: nn.Module, choices: list[Choice], materials: Materials, seed: int
) -> list[QualityRow]:
    """Perplexity, KL, top-1 and recall on the rows that were held back; none without them."""
    data = materials.held_out
    if data is None:
        return []
    ids, mask = data.packed
    probed = enough(ids[mask.bool().all(-1)])
    original = measure(source.model, data, seed=seed, with_recall=probed)
    ours = measure(converted, data, source.model, seed=seed, with_recall=probed)
    size = next(source.model.parameters()).element_size()
    before = size * sum(c.before.cache for c in choices)
    after = size * sum(c.after.cache for c in choices)
    return [
        _row("original", "original", original, before),
        _row("converted", "converted", ours, after),
    ]


def _row(name: str, role: Any, quality: Quality, cache_bytes: int) -> QualityRow:
    return QualityRow(
        name=name, role=role, cache_bytes_per_token=cache_bytes, ppl=quality.perplexity,
        kl=quality.kl, top1=quality.top1,
        recall={task: score.accuracy for task, score in quality.recall.items()},
    )  # fmt: skip


def check_gates(verify: Verify, rows: list[QualityRow]) -> list[Gate]:
    """Every gate the plan sets, with what was measured."""
    limits = verify.gates
    if not limits:
        return []
    original = next(r for r in rows if r.role == "original")
    ours = next(r for r in rows if r.role == "converted")
    assert original.ppl is not None and ours.ppl is not None
    kept = [
        ours.recall[t] / score for t, score in original.recall.items() if score > 0.05
    ]  # a task the original cannot do says nothing
    values: dict[str, tuple[float | None, str]] = {
        "max_ppl_increase": (ours.ppl / original.ppl - 1.0, "<="),
        "max_kl": (ours.kl, "<="),
        "min_top1": (ours.top1, ">="),
        "min_recall": (min(kept) if kept else None, ">="),
    }
    gates = []
    for name, limit in limits.items():
        value, relation = values[name]
        if value is None:
            gates.append(
                Gate(name=name, verdict="fail", limit=limit, relation=relation,  # type: ignore[arg-type]
                     reason="the original has no recall on this data, so nothing can be kept")
            )  # fmt: skip
            continue
        good = value <= limit if relation == "<=" else value >= limit
        gates.append(
            Gate(
                name=name, verdict="pass" if good else "fail", limit=limit, value=value,
                relation=relation,  # type: ignore[arg-type]
            )
        )  # fmt: skip
    return gates


def gate_error(gates: list[Gate], checks: list[ParityCheck]) -> GateError:
    """The error that lists every gate and parity check that failed."""
    lines = [f"{g.name}: {g.value} (limit {g.relation} {g.limit})" for g in gates]
    lines += [
        f"{p.name}: {p.judged_by} {getattr(p, p.judged_by):.3g} (limit {p.tolerance:.3g})"
        for p in checks
    ]
    return GateError(
        "the converted model failed verification; nothing was published",
        why="; ".join(lines),
        next_step="keep more cache (kv_keep), calibrate longer, or loosen the plan's gates",
    )
