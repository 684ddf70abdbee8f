"""What the rows of the coverage campaign add up to."""

from __future__ import annotations

from typing import Any

import tiny_models

#: Largest relative difference of a converted model's output that counts as equal (float32).
TOLERANCE = 1e-4


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Counts per task and over all."""
    out: dict[str, dict[str, float]] = {}
    for task in (*tiny_models.TASKS, "all"):
        mine = [r for r in rows if task in ("all", r["task"]) and "not_built" not in r]
        cores = sum(total(r) for r in mine)
        proven = sum(verified(r) for r in mine)
        converted = [r for r in mine if r.get("sites")]
        out[task] = {
            "models": len(mine),
            "cores": cores,
            "verified": proven,
            "share": round(proven / cores, 4) if cores else 1.0,
            "with_sites": len(converted),
            "identity_equal": sum(equal(r) for r in converted),
            "silently_different": sum(different(r) for r in converted),
            "generate_equal": sum(r["identity"].get("generate") == "equal" for r in converted),
            "generate_differs": sum(r["identity"].get("generate") == "differs" for r in converted),
        }
    return out


def total(row: dict[str, Any]) -> int:
    """Cores of a model: what ran, or what was seen in the graph, whichever is more."""
    refused: dict[str, int] = row.get("refused", {})
    return max(int(row.get("cores", 0)), verified(row) + sum(refused.values()))


def verified(row: dict[str, Any]) -> int:
    """Cores that were understood and proven, those of latent attention included."""
    return int(row.get("verified", row.get("sites", 0)))


def equal(row: dict[str, Any]) -> bool:
    """Whether the converted model computed the same everywhere it was compared.

    On the long text as near as the original is to itself in float64, where that is further.
    """
    gaps = dict(row["identity"].get("gaps") or {})
    long, own = gaps.pop("long", 0.0), gaps.pop("rounding", 0.0)
    return bool(gaps) and max(gaps.values()) <= TOLERANCE and long <= max(TOLERANCE, own)


def different(row: dict[str, Any]) -> bool:
    """Converted without a word, and not the same."""
    told = "error" in row["identity"]
    return not told and (not equal(row) or row["identity"].get("generate") == "differs")


def table(results: dict[str, Any]) -> str:
    """Markdown: coverage per task, and where it was measured."""
    lines = [
        "| models of | built | cores | found and verified | identity equal | generate equal |",
        "|---|---|---|---|---|---|",
    ]
    for task, c in summary(results["rows"]).items():
        if not c["models"]:
            continue
        wrote = c["generate_equal"] + c["generate_differs"]
        lines.append(
            f"| {task} | {c['models']} | {c['cores']} | {c['verified']} ({c['share']:.1%}) | "
            f"{c['identity_equal']} of {c['with_sites']} | {c['generate_equal']} of {wrote} |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in results["inputs"]["versions"].items())
    dates = sorted({row.get("date", results["date"]) for row in results["rows"]})
    when = " to ".join(dates[:: max(len(dates) - 1, 1)])
    caption = (
        f"{versions}; {when}, {results['device']}. Tiny random models made from their "
        f"configs, two shapes, padding and a text of up to 1,023 tokens; identity: outputs within "
        f"{TOLERANCE:g} of the original's largest, on the long text within what the original's own "
        f"rounding is where that is more; generate: greedy tokens with a cache, where the original "
        f"can. Command: `{results['command']}`"
    )
    return "\n".join([*lines, "", caption])


def reasons(rows: list[dict[str, Any]]) -> list[tuple[str, int, list[str]]]:
    """Every reason, the cores it stands for, and the models."""
    found: dict[str, tuple[int, list[str]]] = {}
    for row in rows:
        items = dict(row.get("refused", {}))
        for key in ("not_found", "crash"):
            if key in row:
                items[f"{key}: {row[key]}"] = max(total(row), 1)
        missing = total(row) - verified(row) - sum(row.get("refused", {}).values())
        if missing > 0 and "not_found" not in row and "crash" not in row:
            items["not seen in the graph"] = missing
        for reason, count in items.items():
            before = found.get(reason, (0, []))
            found[reason] = (before[0] + count, [*before[1], row["class"]])
    return sorted(((r, n, m) for r, (n, m) in found.items()), key=lambda item: -item[1])
