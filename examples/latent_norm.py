"""What the norm that DeepSeek classes force on the latent costs, and what avoids it.

    python examples/latent_norm.py --model examples/models/pycode-gqa \\
        --out examples/results/latent_norm.json

The plan `deepseek` at half and at a quarter of the cache: without the norm; the same checkpoint in
transformers' own DeepseekV3ForCausalLM, whose norm the export anchors; with the norm for real
(`latent_norm: rms`, as servers need it); and both after training on a few tokens. Every finished
row is written at once, so the same command continues after an interruption. `--table` prints the
Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import campaign

KEEPS = (0.5, 0.25)
PPL_TOKENS, RECALL_TOKENS, TRAINED = 256, 512, 20_000
NORM = {"latent_norm": "rms", "center": False}
#: name -> options on top of the plan, tokens trained, whether transformers' class is measured
KINDS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "no norm": ({}, 0, False),
    "stock class, norm anchored": ({}, 0, True),
    "norm": (NORM, 0, False),
    "stock class, norm": (NORM, 0, True),
    f"no norm, {TRAINED // 1000}k tokens": ({}, TRAINED, False),
    f"norm, {TRAINED // 1000}k tokens": (NORM, TRAINED, False),
}


class Campaign:
    """Model and data, loaded once; `row` measures one row."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from reattend.data import load_data

        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        text = args.model / "heldout.txt"
        self.text, self.long = (
            load_data(text, self.tokenizer, seq_len=length, seed=args.seed).take(rows)
            for length, rows in ((PPL_TOKENS, args.rows), (RECALL_TOKENS, args.rows // 4))
        )

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": campaign.sha256(self.args.model / "calibration.txt"),
            "heldout": self.text.fingerprint,
            "rows": self.args.rows,
            "seed": self.args.seed,
        }

    def row(self, keep: float | None, kind: str) -> dict[str, Any]:
        """Convert, where asked export and load with transformers' class, and measure."""
        begin = time.perf_counter()
        model = self.model if keep is None else self.converted(keep, kind)
        row = {"keep": keep, "kind": kind, "seconds": round(time.perf_counter() - begin, 1)}
        return {**row, **self.measured(model)}

    def converted(self, keep: float, kind: str) -> Any:
        """The model of one row, float32."""
        import torch
        from transformers import AutoModelForCausalLM

        from reattend import convert, export
        from reattend.plan import Plan

        options, tokens, stock = KINDS[kind]
        plan = Plan.load("deepseek").to_dict()
        del plan["targets"]
        plan["rules"][0] |= {"kv_keep": keep, **options}
        plan["calibrate"] = {"statistics_tokens": 32_768, "tokens": tokens}
        text = str(self.args.model / "calibration.txt")
        result = convert(
            str(self.args.model), plan, data=text, seed=self.args.seed, dtype="float32"
        )
        if not stock:
            return result.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            made = export(result.model, "deepseek", out=Path(folder) / "out")
            loaded = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
        assert type(loaded).__name__ == "DeepseekV3ForCausalLM"
        return loaded.eval()

    def measured(self, model: Any) -> dict[str, Any]:
        """Perplexity and copy recall."""
        from reattend.verify.quality import measure
        from reattend.verify.recall import probes, score
        from reattend.verify.scoring import full_scorer

        quality = measure(model, self.text, with_recall=False)
        copy = score(probes(self.long.packed[0], seed=self.args.seed)["copy"], full_scorer(model))
        return {"perplexity": quality.perplexity, "loss": quality.loss, "copy": copy.to_dict()}


def table(results: dict[str, Any]) -> str:
    """Perplexity, its excess over the original, and copy recall as Markdown."""
    start = next(row for row in results["rows"] if row["keep"] is None)
    columns = [f"{100 * keep:g} % of the cache" for keep in KEEPS]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(KEEPS) + 1) + "|"]
    found = {(row["keep"], row["kind"]): row for row in results["rows"]}
    for kind in KINDS:
        cells = []
        for keep in KEEPS:
            row = found.get((keep, kind))
            cells.append("-" if row is None else
                         f"{row['perplexity']:.2f} (+{row['perplexity'] - start['perplexity']:.2f})"
                         f", {100 * row['copy']['accuracy']:.0f} %")  # fmt: skip
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}. Perplexity (over the "
        f"original's {start['perplexity']:.2f}) on {results['inputs']['rows']} x {PPL_TOKENS} "
        f"held-out tokens, copy recall right (original {100 * start['copy']['accuracy']:.0f} %). "
        f"Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/latent_norm.json")
    parser.add_argument("--most", type=int, default=99, help="rows to measure in this run")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("latent_norm.py", args, subject.inputs())
    if results is None:
        return 2
    done = {(row["keep"], row["kind"]) for row in results["rows"]}
    todo = [(None, "original"), *((keep, kind) for kind in KINDS for keep in KEEPS)]
    for keep, kind in [pair for pair in todo if pair not in done][: args.most]:
        print(f"{kind} at {keep} ...", file=sys.stderr, flush=True)
        campaign.add(results, subject.row(keep, kind), args.out)
    if len(results["rows"]) == len(todo):
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
