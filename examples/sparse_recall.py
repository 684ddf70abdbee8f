"""Sparse plans at equal cache, no weight trained: perplexity, recall by distance, densities.

    python examples/sparse_recall.py

Where `sparse_table.py` asks the shipped model, this asks one that has to look things up.
Every row holds about the same share of the cache as its neighbours of the same share, counted on
a real cache after the row's last token. Heads are chosen on `calibration.txt`; held-out text is
only measured on. What chooses keys at run time keeps every row of a cache, and so do powers: they
read about the same share of the keys, counted on what was chosen. Every finished row is written at
once, so the same command continues after an interruption. `--table` prints the Markdown table of an
existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import campaign
import recall_distance
from read_keys import densities, noted

STATISTICS_TOKENS, SINKS, STEPS = 16_384, 4, 60
SHARES = (0.5, 0.25)
KINDS = ("copy", "key-value")
METHODS = (
    "a-shape", "s2", "head-sparse", "duo-attention", "retrieval", "instant", "head-elastic", "moa",
)  # fmt: skip
#: what chooses at run time, in one pass; trained for so many steps where it learns
CHOOSING = (
    "moba", "longheads", "draft", "double-sparsity", "minference", "seer", "dhsa", "dma",
)  # fmt: skip
LEARNING_STEPS = 200
ORDER = (
    "original",
    *(f"{method} {100 * share:.0f} %" for share in SHARES for method in METHODS),
    *(f"{method} {100 * share:.0f} % read" for share in SHARES for method in ("power", *CHOOSING)),
    "tidal, decoded",
    *(f"tidal {percent} % read, decoded" for percent in (50, 30)),
)


def options(name: str, length: int, heads: int, layers: int) -> dict[str, Any]:
    """The options of `to: sparse` for a row of the table: presets, sized for this length.

    Args:
        name: from `ORDER`.
        length: tokens of a text.
        heads: KV heads of all layers.
        layers: of the model.
    """
    method, _, percent = name.partition(" ")
    if method == "tidal,":  # as published, the first two layers read everything
        return {"pattern": {"select": {"kind": "recorded", "at": [1], "topk": length // 4}}}
    share = float(percent.split()[0]) / 100
    if method == "tidal":
        return {"pattern": noted(share, length, layers)}
    window = round(share * length)
    if method in CHOOSING:
        return choosing(method, share, length)
    if method == "power":  # LogSparse's local window, beside blocks an eighth as long
        powers = {"block": window // 16}
        return {"pattern": {"sinks": SINKS, "window": window // 2, "powers": powers}}
    if method == "a-shape":
        return {"pattern": {"sinks": SINKS, "window": window - SINKS}}
    if method == "s2":
        stride = {"period": round((2 - share) / share), "block": length // 32}
        return {"pattern": {"window": window // 2, "stride": stride}}
    if method == "head-elastic":
        rules = [(16, 0.0), (16, 0.125), (8, 0.25), (8, 0.5)]
        found = [
            {"sinks": SINKS, "window": length // part, "window_slope": slope}
            for part, slope in rules
        ]
        return {"candidates": [*found, {"full": True}], "kv_density": share, "density_at": length}
    if method == "moa":
        lengths = [length // 4, length // 2, 3 * length // 4]
        profile = {"sinks": SINKS, "lengths": lengths, "choose_at": length}
        return {"finder": "profile", "kv_density": share, "profile": profile}
    finder = {"head-sparse": "search", "duo-attention": "alpha"}.get(method, method)
    return {**streaming(share, length, heads), "finder": finder, "steps": STEPS}


def choosing(method: str, share: float, length: int) -> dict[str, Any]:
    """The options of a preset that chooses keys at run time."""
    block, reads = length // 32, round(share * length)
    blocks = {"kind": "blocks", "block": block, "ratio": share}
    if method == "minference":
        slashes = [reads // 4, reads // 2, reads - reads // 4]
        lines = [
            {"kind": "vertical-slash", "columns": reads - n, "slashes": n, "first_columns": SINKS,
             "last_slashes": 16}
            for n in slashes
        ]  # fmt: skip
        found = [{"select": x} for x in (*lines, {**blocks, "queries": "pooled"})]
        window = {"sinks": SINKS, "window": reads - SINKS}
        return {"candidates": [window, *found], "kv_density": share, "density_at": length}
    select = {
        "moba": blocks,
        "longheads": {**blocks, "key": "attended", "first": 1, "last": 2},
        "draft": {**blocks, "queries": "pooled"},
        "double-sparsity": {"kind": "channels", "share": 1 / 8, "ratio": share, "phase": "both"},
        "seer": {"kind": "gate", "block": block, "gate_dim": 64, "ratio": share},
        "dhsa": {"kind": "segments", "longest": 2 * block, "local": 2 * block, "ratio": share},
        "dma": {"kind": "values", "ratio": share},
    }[method]
    learns = method in ("seer", "dhsa", "dma")
    pattern = {"select": select} | ({"window": 2 * block} if method == "dma" else {})
    trained = {"finder": "gate", "steps": LEARNING_STEPS} if learns else {}
    return {"pattern": pattern, **trained}


def streaming(share: float, length: int, heads: int) -> dict[str, Any]:
    """As many full heads as leave the others a window of at least a quarter of the share."""
    least = share / 4 + SINKS / length
    full = int((share - least) / (1 - least) * heads)
    window = int((share * heads - full) / (heads - full) * length) - SINKS
    return {"pattern": {"sinks": SINKS, "window": window}, "keep_full": full / heads}


class Campaign:
    """Model and data, loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        from reattend.data import load_data

        self.args = args
        self.model, tokenizer = campaign.opened(args)
        read = {"seq_len": args.tokens, "seed": args.seed}
        self.text = load_data(args.text / "heldout.txt", tokenizer, **read).take(args.rows)
        self.calibration = load_data(
            args.text / "calibration.txt", tokenizer, tokens=STATISTICS_TOKENS, **read
        )

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": self.calibration.fingerprint,
            "heldout": self.text.fingerprint,
            "rows": self.args.rows,
            "tokens": self.args.tokens,
            "distances": recall_distance.distances(self.args.tokens),
            "seed": self.args.seed,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Convert and measure one row."""
        length, layers = self.args.tokens, self.model.config.num_hidden_layers
        heads = layers * self.model.config.num_key_value_heads
        given = {} if name == "original" else options(name, length, heads, layers)
        begin = time.perf_counter()
        model = self._converted(given) if given else self.model
        seconds = time.perf_counter() - begin
        asked = campaign.asked(model, name, length)
        whole = campaign.asked(self.model, "original", length).cache_bytes_per_token
        quality = asked.measure(self.text, teacher=self.model, with_recall=False).to_dict()
        recall = {
            kind: recall_distance.accuracy(
                self.text.packed[0], kind, asked.scorer, seed=self.args.seed
            )
            for kind in KINDS
        }
        return {
            "name": name, "options": given, "seconds": round(seconds, 1),
            "cache_bytes_per_token": asked.cache_bytes_per_token,
            "densities": {
                **densities(model, self.text.packed[0][:4]),
                "kv": asked.cache_bytes_per_token / whole,
            },
            **quality, "recall": recall,
        }  # fmt: skip

    def _converted(self, given: dict[str, Any]) -> Any:
        from reattend import convert

        plan = {
            "rules": [{"sites": "*", "to": "sparse", **given}],
            "calibrate": {"seq_len": self.args.tokens, "statistics_tokens": STATISTICS_TOKENS},
        }
        return convert(self.model, plan=plan, data=self.calibration.packed[0]).model.eval()


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    inputs = results["inputs"]
    apart = inputs["distances"]
    lines = [
        "| plan | KV bytes | pairs attended | full heads | perplexity | KL | "
        + " | ".join(f"{kind} at {'/'.join(map(str, apart))}" for kind in KINDS)
        + " |",
        "|---" * (6 + len(KINDS)) + "|",
    ]
    for row in sorted(results["rows"], key=lambda row: ORDER.index(row["name"])):
        d = row["densities"]
        recall = [" / ".join(f"{100 * x:.0f}" for x in row["recall"][kind]) for kind in KINDS]
        lines.append(
            f"| {row['name']} | {100 * d['kv']:.1f} % ({row['cache_bytes_per_token']:.0f}) "
            f"| {100 * d['attention']:.0f} % | {100 * d['full_heads']:.0f} % "
            f"| {row['perplexity']:.2f} | {row['kl']:.4f} | {' | '.join(recall)} |"
        )
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}, no weight trained; "
        f"{inputs['rows']} x {inputs['tokens']} held-out tokens. Percent of tokens told right, by "
        "the distance in tokens between an item and its repetition: `copy`, spans of other text; "
        "`key-value`, values of random tokens whose keys begin alike. KV bytes: share of a real "
        f"cache after {inputs['tokens']} tokens (bytes per token at 2 bytes a number). Heads and "
        f"windows are chosen on {STATISTICS_TOKENS:,} tokens of calibration.txt, duo-attention in "
        f"{STEPS} steps, what learns to choose keys in {LEARNING_STEPS}. `% read`: keys are "
        "chosen at run time among all (power: by distance), which are kept (not by heads to "
        "which minference gives a window); in one pass, where draft and minference choose for the "
        "whole text at once. `decoded`: token by token, the last two of four layers read what the "
        "second one noted; where a share is read, the last "
        "three what the first one noted, which alone reads a quarter. Command: "
        f"`{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/sparse_recall.json")
    parser.set_defaults(model=Path("examples/models/recall-llama"))
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row")
    parser.add_argument("--text", type=Path, default=Path("examples/models/pycode-gqa"))
    parser.add_argument("--only", default="", help="parts of the names wanted, separated by commas")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    words = ("--tokens", str(args.tokens))
    results = campaign.begun("sparse_recall.py", args, subject.inputs(), *words)
    if results is None:
        return 2
    return campaign.fill(results, ORDER, subject.row, args, table)


if __name__ == "__main__":
    sys.exit(main())
