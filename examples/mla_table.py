"""Every MLA preset at equal cache, without training: perplexity and recall.

    python examples/mla_table.py --model examples/models/pycode-gqa \\
        --out examples/results/mla_table.json
    python examples/mla_table.py --model examples/models/pycode-qwen2 \\
        --text examples/models/pycode-gqa --out examples/results/mla_table_qwen2.json

Two kinds of cells: a share of the original cache, and a share of the rotary pairs with everything
else kept. Statistics are collected once for all presets, from `calibration.txt`; held-out text is
only measured on. Every finished cell is written at once, so the same command continues after an
interruption. `--table` prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import campaign

PRESETS = ("transmla", "transmla-paper", "mha2mla", "x-ecomla", "care")
KEEPS = (0.5, 0.25, 0.125, 0.0625)
PAIRS = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
PPL_TOKENS, RECALL_TOKENS, STATISTICS_ROWS = 256, 512, 256


def cells() -> list[str]:
    """Names of all cells, in the table's order."""
    return [*(f"{100 * keep:g} %" for keep in KEEPS), *(f"{share} of pairs" for share in PAIRS)]


def options_of(preset: str, cell: str, config: Any) -> dict[str, Any]:
    """The preset's options with the sizes of a cell, for a block's `DenseConfig`."""
    from reattend.verify.peers import sized

    for keep in KEEPS:
        if cell == f"{100 * keep:g} %":
            return sized(preset, config, kv_keep=keep)
    share = next(share for share in PAIRS if cell == f"{share} of pairs")
    return sized(preset, config, pairs=float(share))


class Campaign:
    """Model, data and statistics, loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from reattend.data import load_data

        self.args, folder = args, args.text or args.model
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.model = model.to(args.device).eval()

        def rows(name: str, length: int, count: int) -> Any:
            text = load_data(folder / name, self.tokenizer, seq_len=length, seed=args.seed)
            return text.take(count)

        self.text = rows("heldout.txt", PPL_TOKENS, args.rows)
        self.long = rows("heldout.txt", RECALL_TOKENS, max(2, args.rows // 4))
        self.calibration = rows("calibration.txt", PPL_TOKENS, STATISTICS_ROWS)
        self.moments: dict[str, Any] = {}

    def inputs(self) -> dict[str, Any]:
        """What the cells depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": self.calibration.fingerprint,
            "heldout": self.text.fingerprint,
            "heldout_long": self.long.fingerprint,
            "rows": self.args.rows,
            "seed": self.args.seed,
        }

    def prepare(self) -> None:
        """Find the blocks and collect what any preset reads."""
        from reattend import find_attention, statistics
        from reattend.plan import Plan
        from reattend.preflight import preflight
        from reattend.rewriting import normal_forms

        self.found = find_attention(self.model)
        choices = preflight(self.found, Plan.load("transmla"))
        self.config = choices[0].config
        wanted: frozenset[Any] = frozenset({"attention", "sample"})
        if self.config.k.norm is None:
            wanted |= {"inputs"}
        forms = normal_forms(self.model, choices)
        self.moments = statistics.collect(
            self.model,
            {c.site.path: (forms[c.site.path], c.site.binding) for c in choices},
            self.calibration.batches(8),
            needs={c.site.path: wanted for c in choices},
        )

    def original(self) -> dict[str, Any]:
        """The model as it is."""
        return {"preset": "original", "cell": "original", **self.measured(self.model)}

    def cell(self, preset: str, cell: str) -> dict[str, Any]:
        """Convert and measure one cell."""
        from reattend.allocation import allocate
        from reattend.errors import ReattendError
        from reattend.plan import Plan
        from reattend.preflight import preflight
        from reattend.rewriting import rewrite

        row: dict[str, Any] = {"preset": preset, "cell": cell}
        begin = time.perf_counter()
        try:
            plan = Plan.load({"rules": [options_of(preset, cell, self.config)]})
            choices = preflight(self.found, plan)
        except ReattendError as error:
            return {**row, "refused": str(error)}
        allocate(self.model, None, choices, self.moments, self.calibration)
        converted = rewrite(self.model, choices, self.moments)
        seconds = time.perf_counter() - begin
        built = [b.evidence for b in converted.built.values()]
        sizes = [(b["qk_rope_head_dim"], b["kv_lora_rank"]) for b in built]
        return {**row, "sizes": sizes, "seconds": round(seconds, 1),
                **self.measured(converted.model.eval())}  # fmt: skip

    def measured(self, model: Any) -> dict[str, Any]:
        """Perplexity, copy and passkey recall."""
        from reattend.verify.quality import measure
        from reattend.verify.recall import probes, score
        from reattend.verify.scoring import full_scorer

        quality = measure(model, self.text, with_recall=False)
        built = probes(self.long.packed[0], seed=self.args.seed)
        recall = {
            name: score(built[name], full_scorer(model)).to_dict() for name in ("copy", "passkey")
        }
        found = {"loss": quality.loss, "perplexity": quality.perplexity, "tokens": quality.tokens}
        return {**found, "recall": recall}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: perplexity (recall) per preset and cell."""
    found = {(row["preset"], row["cell"]): row for row in results["rows"]}
    start = found["original", "original"]

    def shown(row: dict[str, Any] | None, best: float) -> str:
        if row is None:
            return "-"
        if "refused" in row:
            return "refused"
        ppl = f"{row['perplexity']:.2f}"
        ppl = f"**{ppl}**" if row["perplexity"] == best else ppl
        copy, key = row["recall"]["copy"], row["recall"]["passkey"]
        return f"{ppl} ({100 * copy['accuracy']:.0f} %; {key['gain']:.1f})"

    names = cells()
    lines = [f"| preset | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for preset in PRESETS:
        line = [preset]
        for name in names:
            column = [found[p, name] for p in PRESETS if (p, name) in found]
            best = min((r["perplexity"] for r in column if "refused" not in r), default=0.0)
            line.append(shown(found.get((preset, name)), best))
        lines.append(f"| {' | '.join(line)} |")
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}, no training. Original: "
        f"{shown(start, 0.0)}. Each cell: perplexity on {results['inputs']['rows']} x "
        f"{PPL_TOKENS} held-out tokens (recall, {results['inputs']['rows'] // 4} x "
        f"{RECALL_TOKENS} tokens: a passage copied right; nats that a key seen before gains over "
        f"one never seen). {_excess(found)}Share of the cache: all layers together; share of the "
        f"rotary pairs: everything else kept. Statistics: {STATISTICS_ROWS * PPL_TOKENS:,} tokens "
        f"of calibration.txt, on float32 weights; a table made from other statistics has other "
        f"numbers for the same preset. Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def _excess(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """How much more the published method costs at a quarter of the rotary pairs."""
    cell, start = "1/4 of pairs", found["original", "original"]["perplexity"]
    ours, paper = (found.get((preset, cell)) for preset in PRESETS[:2])
    if ours is None or paper is None:
        return ""
    more = [row["perplexity"] - start for row in (ours, paper)]
    if more[0] <= 0:
        return f"At {cell} `transmla` costs nothing. "
    return (
        f"At {cell} the perplexity above the original's is {more[1] / more[0]:.1f} times less "
        f"with `transmla` than with `transmla-paper`. "
    )


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/mla_table.json")
    parser.add_argument("--only", default="", help="presets, comma-separated")
    parser.add_argument("--text", type=Path, help="folder of the texts and the tokenizer")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing cells, writing after each."""
    subject = Campaign(args)
    more = ("--text", campaign.shown(args.text)) if args.text else ()
    results = campaign.begun("mla_table.py", args, subject.inputs(), *more)
    if results is None:
        return 2
    done = {(row["preset"], row["cell"]) for row in results["rows"]}
    wanted = [name for name in args.only.split(",") if name] or list(PRESETS)
    todo = [("original", "original")]
    todo += [(preset, cell) for cell in cells() for preset in PRESETS if preset in wanted]
    for preset, cell in [pair for pair in todo if pair not in done]:
        print(f"{preset} at {cell} ...", file=sys.stderr, flush=True)
        if not subject.moments:
            subject.prepare()
        row = subject.original() if preset == "original" else subject.cell(preset, cell)
        campaign.add(results, row, args.out)
    results["date"] = max(row["date"] for row in results["rows"])
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
