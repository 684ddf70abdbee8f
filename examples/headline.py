"""The README's first table, from the results of `quality.py`: what is kept, beside what it costs.

    python examples/headline.py

Nothing is measured here: the rows are those of `examples/results/quality.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "quality.json"
SHARES = ("50", "25", "12.5")
#: next to each share of the cache, the quantised cache whose size is closest
BITS = {"50": 8, "25": 4, "12.5": 2}
#: and the quantised cache of a converted model
BOTH = {"25": "transmla 50 %, int8 cache", "12.5": "transmla 50 %, int4 cache"}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = {row["name"]: row for row in results["rows"]}
    whole = rows["original"]
    lines = [
        "| cache | sliding window | quantised cache | TransMLA as published | `transmla` "
        "| `transmla` 50 %, quantised |",
        "|---|---|---|---|---|---|",
    ]
    for share in SHARES:
        packed = rows[f"int{BITS[share]} KV cache"]
        both = rows.get(BOTH.get(share, ""))
        cells = [
            f"{share} %",
            cell(rows[f"sliding window {share} %"]),
            sized(packed),
            cell(rows[f"transmla-paper {share} %"]),
            cell(rows[f"transmla {share} %"]),
            "" if both is None else sized(both),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    half = rows["transmla 50 %"]["perplexity"] / whole["perplexity"] - 1
    scored = results["inputs"]["rows"]
    lines += [
        "",
        f"Perplexity (right answers: a copied passage / a passkey / several keys); the original "
        f"has {cell(whole)}. At half of the cache `transmla` adds {100 * half:.1f} %. "
        f"A quantised cache has the size of its format (8, 4, 2 bits).",
        "",
        f"{results['model']}, {results['device']}, {results['date']}; {scored} x 256 held-out "
        f"tokens, recall {scored} x 512. Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """Perplexity, and right answers in percent."""
    right = " / ".join(
        f"{100 * row['recall'][kind]['accuracy']:.0f}" for kind in ("copy", "passkey", "multi_key")
    )
    return f"{row['perplexity']:.2f} ({right})"


def sized(row: dict[str, Any]) -> str:
    """The same, with the share of the cache."""
    return f"{cell(row)} at {100 * row['share']['256']:.0f} %"


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--table", action="store_true", help="what it does anyway")
    parser.parse_args(argv)
    print(table(json.loads(RESULTS.read_text("utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
