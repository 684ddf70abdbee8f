"""Quality at equal cache bytes: the original, its yardsticks, and converted models.

    python examples/quality.py --model examples/models/pycode-gqa \\
        --out examples/results/quality.json

Every finished row is written at once, so the same command continues after an interruption. Other
inputs than those of the file are refused; `--fresh` starts again. `--table` prints the Markdown
table of an existing file and computes nothing. No training happens here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import campaign

KEEPS = (0.5, 0.25, 0.125)
BITS = (8, 4, 2)
PRESETS = ("transmla", "transmla-paper")
#: share and bits of converted models whose cache is quantised as the yardsticks' is
QUANTISED = ((0.5, 8), (0.5, 4))
PPL_TOKENS, RECALL_TOKENS = 256, 512


def converted_row(preset: str, keep: float, args: argparse.Namespace) -> Any:
    """The model converted to MLA at this share of the cache, statistics only."""
    from reattend import convert
    from reattend.plan import Plan

    plan = Plan.load(preset).with_set([f"kv_keep={keep}"])
    result = convert(
        str(args.model), plan=plan, data=str(args.model / "calibration.txt"), seed=args.seed
    )
    return result.model.float().to(args.device).eval()


def row_names() -> list[str]:
    """Every row of the campaign, in the table's order."""
    return [
        "original",
        *(f"sliding window {100 * keep:g} %" for keep in KEEPS),
        *(f"int{bits} KV cache" for bits in BITS),
        *(f"{preset} {100 * keep:g} %" for preset in PRESETS for keep in KEEPS),
        *(_as_large_as(bits) for bits in BITS),
        *(_quantised(keep, bits) for keep, bits in QUANTISED),
    ]


def _as_large_as(bits: int) -> str:
    """The row of `transmla` with as many bytes as the original's quantised cache has."""
    return f"transmla, bytes of int{bits}"


def _quantised(keep: float, bits: int) -> str:
    """The row of `transmla` with its own cache quantised."""
    return f"transmla {100 * keep:g} %, int{bits} cache"


class Campaign:
    """Model and data, loaded once; `row(name)` measures one row."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from reattend.data import load_data

        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        self.model = model.to(args.device).eval()
        text = args.model / "heldout.txt"
        self.text, self.long = (
            load_data(text, tokenizer, seq_len=length, seed=args.seed).take(args.rows)
            for length in (PPL_TOKENS, RECALL_TOKENS)
        )

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": campaign.sha256(self.args.model / "calibration.txt"),
            "heldout_256": self.text.fingerprint,
            "heldout_512": self.long.fingerprint,
            "rows": self.args.rows,
            "seed": self.args.seed,
            "kv_backend": self.args.kv_backend,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Measure one row: perplexity and agreement at 256 tokens, recall at 512."""
        asked = self._asked(name)
        short, long = (asked(context) for context in (PPL_TOKENS, RECALL_TOKENS))
        quality = short.measure(self.text, teacher=self.model, with_recall=False).to_dict()
        scores = long.recall(self.long, seed=self.args.seed)
        quality["recall"] = {key: value.to_dict() for key, value in scores.items()}
        return {
            "name": name,
            "cache_bytes_per_token": {"256": short.cache_bytes_per_token,
                                      "512": long.cache_bytes_per_token},
            "share": {"256": short.share, "512": long.share},
            **quality,
        }  # fmt: skip

    def _asked(self, name: str) -> Callable[[int], Any]:
        """How the row's model is asked, for a context."""
        from reattend.verify.yardsticks import original, sliding_window

        for keep in KEEPS:
            if name == f"sliding window {100 * keep:g} %":
                return lambda context: sliding_window(self.model, keep=keep, context=context)
            for preset in PRESETS:
                if name == f"{preset} {100 * keep:g} %":
                    return self._converted(name, converted_row(preset, keep, self.args))
        for bits in BITS:
            if name == f"int{bits} KV cache":
                return self._in_bits(self.model, bits)
            if name == _as_large_as(bits):
                keep = self._in_bits(self.model, bits)(PPL_TOKENS).share
                return self._converted(name, converted_row("transmla", keep, self.args))
        for keep, bits in QUANTISED:
            if name == _quantised(keep, bits):
                model = converted_row("transmla", keep, self.args)
                return self._scaled(name, self._in_bits(model, bits))
        return lambda context: original(self.model, context=context)

    def _in_bits(self, model: Any, bits: int) -> Callable[[int], Any]:
        """A model with its cache quantised."""
        from reattend.verify.yardsticks import quantised_cache

        return lambda context: quantised_cache(
            model, bits=bits, context=context, backend=self.args.kv_backend
        )

    def _converted(self, name: str, model: Any) -> Callable[[int], Any]:
        """A converted model as it is."""
        from reattend.verify.yardsticks import original

        return self._scaled(name, lambda context: original(model, context=context))

    def _scaled(self, name: str, asked: Callable[[int], Any]) -> Callable[[int], Any]:
        """A converted model's row, with its own cache over the original's."""
        from dataclasses import replace

        from reattend.verify.yardsticks import original

        full = original(self.model, context=1).cache_bytes_per_token

        def ask(context: int) -> Any:
            plain = asked(context)
            return replace(plain, name=name, share=plain.cache_bytes_per_token / full)

        return ask


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"| model | cache bytes/token (share) | perplexity | KL | top-1 | {campaign.RECALL}",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {name: place for place, name in enumerate(row_names())}
    for row in sorted(results["rows"], key=lambda row: order[row["name"]]):
        lines.append(
            f"| {row['name']} | {row['cache_bytes_per_token']['256']:.0f} "
            f"({100 * row['share']['256']:.1f} %) | {row['perplexity']:.2f} | {row['kl']:.3f} "
            f"| {100 * row['top1']:.1f} % | {campaign.recall_cells(row['recall'])}"
        )
    dates = ", ".join(sorted({row.get("date", results["date"]) for row in results["rows"]}))
    rows, backend = results["inputs"]["rows"], results["inputs"]["kv_backend"]
    lines += [
        "",
        f"{results['model']}, {dates}, {results['device']}, no training. Perplexity, KL "
        f"to the original and top-1 agreement: {rows} x {PPL_TOKENS} held-out tokens; recall: "
        f"{rows} x {RECALL_TOKENS}; gain: nats per key token over the same key never shown. Cache "
        f"at {PPL_TOKENS} tokens, 2 bytes per number; quantised caches (`{backend}`) with scales, "
        f"zero points and residual. {_unequal(results['rows'])}Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def _unequal(rows: list[dict[str, Any]]) -> str:
    """Which lines hold the bytes of which others."""
    sizes = [
        f"{row['name'].split()[0]} holds {100 * row['share']['256']:.1f} %"
        for row in rows
        if row["name"].endswith("KV cache")
    ]
    if not sizes:
        return ""
    return (
        "Sliding windows are at the bytes of the converted models above; a quantised cache has the "
        f"size of its format ({', '.join(sizes)}), and `transmla, bytes of` is converted to that. "
        "`transmla-paper` is the method as published. "
    )


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/quality.json")
    parser.add_argument("--kv-backend", choices=("minmax", "hqq", "quanto"), default="minmax")
    parser.add_argument("--only", default="", help="rows whose name contains this, comma-separated")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("quality.py", args, subject.inputs(), "--kv-backend", args.kv_backend)
    if results is None:
        return 2
    done = {row["name"] for row in results["rows"]}
    wanted = [part for part in args.only.split(",") if part]
    for name in row_names():
        if name in done or (wanted and not any(part in name for part in wanted)):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = subject.row(name)
        campaign.add(results, row, args.out)
    if results["rows"]:
        results["date"] = max(row["date"] for row in results["rows"])
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
