"""What sharing heads loses: fewer key/value heads, at the start and after some training.

    python examples/heads_table.py --out examples/results/heads_table.json

Every row converts the shipped model anew; training distils the original on `calibration.txt`, as a
plan does it. Held-out text is only measured on. Every finished row is written at once, so the same
command continues after an interruption. `--table` prints the Markdown table of an existing file.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import campaign
import linear_table

TOKENS = linear_table.TOKENS
BOTH = ["layerwise", "end-to-end"]
#: blocks of 8 query heads in 2 KV groups: the one merge there is
RULES: dict[str, dict[str, Any]] = {
    "1 of 2 KV heads, mean": {
        "to": "gqa", "keys": "mean", "values": "mean", "group": "neighbours",
    },
    "1 of 2 KV heads, procrustes": {"to": "gqa", "keys": "procrustes", "values": "procrustes"},
    "1 of 2 KV heads, joint": {"to": "gqa"},
    "1 of 2 KV groups pruned": {"to": "prune-heads", "keep": 1},
}  # fmt: skip
TRAINED = 50_000
ROWS: dict[str, linear_table.Row] = {
    f"{name}{told}": ({"sites": "*", **rule}, tokens, BOTH)
    for told, tokens in ((", untrained", 0), ("", TRAINED))
    for name, rule in RULES.items()
}


#: what rows say of `calibrate` beside tokens and stages: MiniLM's relations with the outputs
MORE: dict[str, dict[str, Any]] = {
    f"{name}, relations": {"relations": ["q", "k", "v"]}
    for name in ("1 of 2 KV heads, joint", "1 of 2 KV groups pruned")
}
ROWS |= {
    name: ({"sites": "*", **RULES[name.removesuffix(", relations")]}, TRAINED, BOTH)
    for name in MORE
}


#: of 6 layers; weights are saved, not the cache
ROWS |= {
    f"{atoms} atoms for 6 layers{told}": ({"sites": "*", "to": "masa", "atoms": atoms}, n, BOTH)
    for told, n in ((", untrained", 0), ("", TRAINED))
    for atoms in (5, 4, 3, 2)
}


#: of 6 layers, of which the first and the last stay
ROWS |= {
    f"{n} of 6 layers follow{told}": ({"sites": "*", "to": "echo", "followers": n}, tokens, BOTH)
    for told, tokens in ((", untrained", 0), ("", TRAINED))
    for n in (1, 2)
}


#: experts start as the block, so they learn nothing from it: the text teaches them, and the model
#: that has none as well
EXPERTS: dict[str, dict[str, Any]] = {
    "no experts": {"to": "dense"},
    "2 experts, shared KV": {"to": "attn-moe", "experts": 2, "kv": "shared"},
    "2 experts, own KV": {"to": "attn-moe", "experts": 2, "kv": "separate"},
    "4 experts, shared KV": {"to": "attn-moe", "experts": 4, "kv": "shared"},
}
ROWS["2 experts, shared KV, untrained"] = (
    {"sites": "*", **EXPERTS["2 experts, shared KV"]}, 0, BOTH,
)  # fmt: skip
for name, rule in EXPERTS.items():
    ROWS[f"{name}, next-token loss"] = ({"sites": "*", **rule}, TRAINED, ["end-to-end"])
    MORE[f"{name}, next-token loss"] = {"loss": "lm"}


class Campaign(linear_table.Campaign):
    """Rows that say how many parameters the model has."""

    def row(self, name: str) -> dict[str, Any]:
        """One row."""
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.more = MORE.get(name, {})
        found = super().row(name)
        return {"parameters": self.parameters, **found}

    def converted(self, asked: Any, tokens: int, stages: list[str]) -> tuple[Any, dict[str, Any]]:
        """See the base class."""
        model, lost = super().converted(asked, tokens, stages)
        self.parameters = sum(p.numel() for p in model.parameters())
        return model, lost


def _trained(rows: list[dict[str, Any]]) -> str:
    told = all(ROWS[row["name"]][1] == 0 for row in rows if row["name"] in ROWS)
    return "" if told else f"distilled on {TRAINED:,} tokens of calibration.txt; "


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| model | parameters | cache | perplexity | KL | {campaign.RECALL}",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = ["original", *ROWS]
    for row in sorted(results["rows"], key=lambda row: order.index(row["name"])):
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.2f} M | "
            f"{row['cache_bytes_per_token']:.0f} | {row['perplexity']:.2f} | {row['kl']:.4f} | "
            + campaign.recall_cells(row["recall"])
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{results['model']}, {results['date']}, {results['device']}; 8 query heads in 2 KV "
            f"groups, 6 layers; {_trained(results['rows'])}"
            f"{results['inputs']['rows']} held-out rows of {TOKENS} tokens. Cache: bytes per "
            f"token, all layers, 2 bytes a number. Command: `{results['command']}`",
        ]
    )


def measure(args: argparse.Namespace) -> int:
    """Fill the file."""
    made = Campaign(args, ROWS)
    results = campaign.begun("heads_table.py", args, made.inputs())
    if results is None:
        return 2
    return campaign.fill(results, ["original", *ROWS], made.row, args, table)


def main() -> int:
    """Command line."""
    parser = campaign.arguments(str(__doc__), "examples/results/heads_table.json")
    parser.add_argument("--only", default="", help="rows whose name has one of these parts")
    return campaign.run(parser.parse_args(), table, measure)


if __name__ == "__main__":
    sys.exit(main())
