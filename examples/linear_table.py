"""What linear attention loses at its start and after some training: perplexity and recall.

    python examples/linear_table.py --out examples/results/linear_table.json

The preset `lolcats` and its parts: without the window (`hedgehog`), and the window alone (sparse
heads that see the mean length of its terraces, nothing older); `linear`, the same block from
another start; `hybrid`, half of the layers. Trained by distillation as a plan does it, block by
block, then end to end; `layerwise` stops after the blocks, which is LoLCATs' attention transfer,
and `end-to-end` leaves that out.
Every row converts anew. Training reads `calibration.txt`; held-out text is only measured on.
Every finished row is written at once, so the same command continues after an
interruption. `--table` prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import campaign

TOKENS = 512
#: terraces of 64 show 65 to 128 keys
WINDOW: dict[str, Any] = {"sites": "*", "to": "sparse", "pattern": {"window": 96}}
BLOCKS, WHOLE = ["layerwise"], ["end-to-end"]
BOTH = [*BLOCKS, *WHOLE]
#: preset or rule, tokens trained on, stages
Row = tuple[Any, int, list[str]]
ROWS: dict[str, Row] = {
    "window of 96": (WINDOW, 0, BOTH),
    "lolcats; untrained": ("lolcats", 0, BOTH),
    "linear; untrained": ("linear", 0, BOTH),
    "hedgehog; untrained": ("hedgehog", 0, BOTH),
    "lolcats; 50k": ("lolcats", 50_000, BOTH),
    "linear; 50k": ("linear", 50_000, BOTH),
    "lolcats; 50k layerwise": ("lolcats", 50_000, BLOCKS),
    "lolcats; 50k end-to-end": ("lolcats", 50_000, WHOLE),
    "hedgehog; 50k": ("hedgehog", 50_000, BOTH),
    "hedgehog; 50k end-to-end": ("hedgehog", 50_000, WHOLE),
    "window of 96; 50k": (WINDOW, 50_000, BOTH),
    "hybrid; 50k": ("hybrid", 50_000, BOTH),
    "lolcats; 200k": ("lolcats", 200_000, BOTH),
    "linear; 200k": ("linear", 200_000, BOTH),
    "hedgehog; 200k": ("hedgehog", 200_000, BOTH),
    "window of 96; 200k": (WINDOW, 200_000, BOTH),
    "linear; 1M": ("linear", 1_000_000, BOTH),
    "lolcats; 1M": ("lolcats", 1_000_000, BOTH),
}


class Campaign:
    """Model and data, loaded once; `rows` by name."""

    def __init__(self, args: argparse.Namespace, rows: dict[str, Row]) -> None:
        from reattend.data import load_data

        self.args, self.rows = args, rows
        self.more: dict[str, Any] = {}  # of the plan's calibrate section
        self.model, tokenizer = campaign.opened(args)
        read = {"tokenizer": tokenizer, "seq_len": TOKENS, "seed": args.seed}
        self.text = load_data(args.model / "heldout.txt", **read).take(args.rows)
        self.calibration = load_data(args.model / "calibration.txt", **read)

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": self.calibration.fingerprint,
            "heldout": self.text.fingerprint,
            "rows": self.args.rows,
            "seed": self.args.seed,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Convert, train and measure one row."""
        from reattend.verify.yardsticks import original

        begin, model = time.perf_counter(), self.model
        stages: dict[str, Any] = {}
        if name != "original":
            model, stages = self.converted(*self.rows[name])
        seconds = time.perf_counter() - begin
        asked = original(model, context=TOKENS)
        quality = asked.measure(self.text, teacher=self.model, with_recall=False).to_dict()
        recall = {k: v.to_dict() for k, v in asked.recall(self.text, seed=self.args.seed).items()}
        return {
            "name": name, "seconds": round(seconds, 1), "stages": stages,
            "cache_bytes_per_token": asked.cache_bytes_per_token, **quality, "recall": recall,
        }  # fmt: skip

    def converted(self, asked: Any, tokens: int, stages: list[str]) -> tuple[Any, dict[str, Any]]:
        """The converted model, and the loss of each stage at its first and last point."""
        from reattend import convert
        from reattend.plan import Plan

        rule = Plan.load(asked).rules[0].to_dict() if isinstance(asked, str) else asked
        calibrate = {"tokens": tokens, "stages": stages, "seq_len": TOKENS, "batch_size": 4}
        calibrate |= self.more
        plan = {"rules": [rule], "calibrate": calibrate}
        made = convert(self.model, plan=plan, data=self.calibration.packed[0], seed=self.args.seed)
        told = made.report.calibration.stages if made.report.calibration is not None else ()
        lost = {s.name: [s.loss[0][1], s.loss[-1][1]] for s in told if s.loss}
        return made.model.eval(), lost


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{results['device']}, {results['date']}, `{results['command']}`: {results['model']}, "
        f"{results['inputs']['rows']} held-out rows of {TOKENS} tokens. Cache: bytes per token "
        f"after {TOKENS} of them, all layers, 2 bytes a number. Removed: share of the perplexity "
        f"that the untrained start has above the original's.",
        "",
        f"| model | cache | perplexity | removed | {campaign.RECALL}",
        "|---|---|---|---|---|---|---|",
    ]
    known = {row["name"]: row["perplexity"] for row in results["rows"]}
    order = ["original", *ROWS]
    for row in sorted(results["rows"], key=lambda row: order.index(row["name"])):
        start = known.get(f"{row['name'].partition(';')[0]}; untrained", row["perplexity"])
        gone = start - row["perplexity"]
        share = f"{gone / (start - known['original']):.0%}" if gone else ""
        cells = f"| {row['name']} | {row['cache_bytes_per_token']:.0f} | {row['perplexity']:.2f} | "
        cells += f"{share} | "
        lines.append(cells + campaign.recall_cells(row["recall"]))
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> int:
    """Fill the file."""
    made = Campaign(args, ROWS)
    results = campaign.begun("linear_table.py", args, made.inputs())
    if results is None:
        return 2
    return campaign.fill(results, ["original", *ROWS], made.row, args, table)


def main() -> int:
    """Command line."""
    parser = campaign.arguments(str(__doc__), "examples/results/linear_table.json")
    parser.add_argument("--only", default="", help="rows whose name has one of these parts")
    return campaign.run(parser.parse_args(), table, measure)


if __name__ == "__main__":
    sys.exit(main())
