"""The plan's gates over what was measured."""

from __future__ import annotations

from reattend.errors import GateError
from reattend.plan import Verify
from reattend.report import Report
from reattend.report.evidence import Gate, QualityRow


def check_gates(verify: Verify, rows: list[QualityRow]) -> list[Gate]:
    """Every gate the plan sets, with what was measured."""
    limits = verify.gates
    if not limits:
        return []
    original = next(r for r in rows if r.role == "original")
    ours = next(r for r in reversed(rows) if r.role == "converted")  # as `Quality.last`
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


def enforce_gates(report: Report) -> None:
    """Stop where a gate or a parity check failed.

    Raises:
        GateError: listing every one of them.
    """
    gates = [g for g in report.gates if g.verdict == "fail"]
    checks = [p for p in report.parity if p.verdict == "fail"]
    if not gates and not checks:
        return
    lines = [f"{g.name}: {g.value} (limit {g.relation} {g.limit})" for g in gates]
    lines += [
        f"{p.name}: {p.judged_by} {getattr(p, p.judged_by):.3g} (limit {p.tolerance:.3g})"
        for p in checks
    ]
    raise GateError(
        "the converted model failed verification; nothing was published",
        why="; ".join(lines),
        next_step="keep more cache (kv_keep), calibrate longer, or loosen the plan's gates",
    )
