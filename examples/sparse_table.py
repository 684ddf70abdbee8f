"""Sparse plans at equal cache, without training: perplexity and recall.

    python examples/sparse_table.py --out examples/results/sparse_table.json

Every row holds about the same share of the cache as its neighbours of the same share, counted on
a real cache after 512 tokens; `tidal` keeps every row and reads about that share, token by token.
Heads are chosen on `calibration.txt`; held-out text is only measured on. Every finished row is
written at once, so the same command continues after an interruption.
`--table` prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import campaign
from read_keys import densities, noted

TOKENS, STATISTICS_TOKENS, LAYERS = 512, 16_384, 6
#: name -> options of `to: sparse`; the shares are those of a cache of 512 tokens
ROWS: dict[str, dict[str, Any]] = {
    "sinks + window 50 %": {"pattern": {"sinks": 4, "window": 252}},
    "s2 50 %": {"pattern": {"window": 128, "stride": {"period": 3, "block": 16}}},
    "elastic window 50 %": {"pattern": {"sinks": 4, "window": 0, "window_slope": 0.5}},
    "head-sparse 50 %": {"pattern": {"sinks": 4, "window": 64}, "keep_full": 5 / 12},
    "sinks + window 25 %": {"pattern": {"sinks": 4, "window": 124}},
    "s2 25 %": {"pattern": {"window": 64, "stride": {"period": 7, "block": 16}}},
    "head-sparse 25 %": {"pattern": {"sinks": 4, "window": 44}, "keep_full": 2 / 12},
    "power, whole cache": {"pattern": {"sinks": 4, "window": 32, "powers": {"block": 16}}},
    "tidal 50 % read, decoded": {"pattern": noted(0.50, TOKENS, LAYERS)},
    "tidal 50 % read, second layer chooses, decoded": {"pattern": noted(0.50, TOKENS, LAYERS, 1)},
    "tidal 25 % read, decoded": {"pattern": noted(0.25, TOKENS, LAYERS)},
}


class Campaign:
    """Model and data, loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        from reattend.data import load_data

        self.args = args
        self.model, tokenizer = campaign.opened(args)
        held_out = args.model / "heldout.txt"
        self.text = load_data(held_out, tokenizer, seq_len=TOKENS, seed=args.seed).take(args.rows)
        self.calibration = load_data(
            args.model / "calibration.txt", tokenizer, seq_len=TOKENS, tokens=STATISTICS_TOKENS,
            seed=args.seed,
        )  # fmt: skip

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
        """Convert and measure one row."""
        begin = time.perf_counter()
        model = self.model if name == "original" else self._converted(ROWS[name])
        seconds = time.perf_counter() - begin
        asked = campaign.asked(model, name, TOKENS)
        whole = campaign.asked(self.model, "original", TOKENS).cache_bytes_per_token
        quality = asked.measure(self.text, teacher=self.model, with_recall=False).to_dict()
        recall = {k: v.to_dict() for k, v in asked.recall(self.text, seed=self.args.seed).items()}
        return {
            "name": name, "options": ROWS.get(name), "seconds": round(seconds, 1),
            "cache_bytes_per_token": asked.cache_bytes_per_token,
            "share": asked.cache_bytes_per_token / whole,
            "read": densities(model, self.text.packed[0][:4])["attention"],
            **quality, "recall": recall,
        }  # fmt: skip

    def _converted(self, options: dict[str, Any]) -> Any:
        from reattend import convert

        plan = {
            "rules": [{"sites": "*", "to": "sparse", **options}],
            "calibrate": {"seq_len": TOKENS, "statistics_tokens": STATISTICS_TOKENS},
        }
        return convert(self.model, plan=plan, data=self.calibration.packed[0]).model.eval()


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| heads see | cache after 512 tokens | pairs read | perplexity | KL | copy: right (nats) "
        "| passkey: right (gain) | several keys: right (gain) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = ["original", *ROWS]
    for row in sorted(results["rows"], key=lambda row: order.index(row["name"])):
        lines.append(
            f"| {row['name']} | {100 * row['share']:.1f} % | {100 * row['read']:.0f} % "
            f"| {row['perplexity']:.2f} | {row['kl']:.4f} | {campaign.recall_cells(row['recall'])}"
        )
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}, no training; "
        f"{results['inputs']['rows']} x {TOKENS} held-out tokens. Shares are counted on a real "
        "cache; pairs of a token and a key are those of a text of as many tokens; `power` and "
        "`tidal` read fewer keys and keep all. `decoded`: token by token, where the first of six "
        "layers, or the first two, read everything, and the last of these notes the tokens that "
        "the layers behind it read; all other rows in one pass. `head-sparse` chooses the heads "
        f"that stay full on {STATISTICS_TOKENS:,} tokens of calibration.txt. Gain: nats per key "
        f"token over the same key never shown. Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/sparse_table.json")
    parser.add_argument("--only", default="", help="parts of the names wanted, separated by commas")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("sparse_table.py", args, subject.inputs())
    if results is None:
        return 2
    return campaign.fill(results, ["original", *ROWS], subject.row, args, table)


if __name__ == "__main__":
    sys.exit(main())
