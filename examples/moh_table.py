"""Mixture-of-Heads on the shipped model: perplexity, recall and balance, before and after training.

    python examples/moh_table.py --out examples/results/moh_table.json

All rows are of the same model; training distils the original on `calibration.txt`, held-out text is
only measured on. The equally calibrated dense model is the original itself: its distance to the
original is zero from the start. Every finished row is written at once, so the same command
continues after an interruption. `--table` prints the Markdown table of an existing file.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import campaign

TOKENS, STATISTICS_TOKENS = 512, 16_384
#: rows that are called long: the tokens they are trained on, and how: at lower rates
LONG = 2_000_000
LONG_WAY: dict[str, Any] = {"lr": 5e-4}
HEAD: dict[str, Any] = {"route": "head", "shared": 4}
HARD: dict[str, Any] = {"router": "qnorm", "gate": "hard"}
#: a router that is known from the start: nothing to anneal, and no heads to spread tokens over
FITTED: dict[str, Any] = {
    "gate": "hard", "router_start": "output-norm", "anneal": 0, "balance_loss": 0,
}  # fmt: skip
#: name -> options of `to: moh`, of blocks with 8 query heads in 2 KV groups
ROWS: dict[str, dict[str, Any]] = {
    "6 of 8 heads": {**HEAD, "top_k": 2},
    "6 of 8 heads, norms of queries": {**HEAD, **HARD, "top_k": 2},
    "6 of 8 heads, fitted": {**HEAD, **FITTED, "top_k": 2},
    "6 of 8 heads, fitted, none shared": {"route": "head", "shared": 0, "top_k": 6, **FITTED},
    "6 of 8 heads on average, fitted": {
        "route": "head", "shared": 0, "top_k": "auto", "active": 0.75, **FITTED,
    },
    "6 of 8 heads, none shared": {"route": "head", "shared": 0, "top_k": 6},
    "4 of 8 heads, none shared": {"route": "head", "shared": 0, "top_k": 4},
    "4 of 8 heads, fitted, none shared": {"route": "head", "shared": 0, "top_k": 4, **FITTED},
    "1 of 2 KV groups": {"route": "kv-group", "shared": 0, "top_k": 1},
}  # fmt: skip


class Campaign:
    """Model and data, loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        from reattend.data import load_data

        self.args = args
        self.model, self.tokenizer = campaign.opened(args)
        held_out = args.model / "heldout.txt"
        self.text = load_data(held_out, self.tokenizer, seq_len=TOKENS, seed=args.seed).take(
            args.rows
        )

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": campaign.sha256(self.args.model / "calibration.txt"),
            "heldout": self.text.fingerprint,
            "rows": self.args.rows,
            "tokens": self.args.tokens,
            "seed": self.args.seed,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Convert, train if the name says so, and measure one row."""
        from reattend.verify.yardsticks import original

        begin, model = time.perf_counter(), self.model
        told: dict[str, Any] = {}
        if name != "original":
            model, told = self._converted(*parts(name, self.args.tokens))
        seconds = time.perf_counter() - begin
        asked = original(model, context=TOKENS)
        quality = asked.measure(self.text, teacher=self.model, with_recall=False).to_dict()
        recall = {k: v.to_dict() for k, v in asked.recall(self.text, seed=self.args.seed).items()}
        return {"name": name, "seconds": round(seconds, 1), **told, **quality, "recall": recall}

    def _converted(self, options: dict[str, Any], tokens: int) -> tuple[Any, dict[str, Any]]:
        from reattend import convert

        plan = {
            "rules": [{"sites": "*", "to": "moh", **options}],
            "calibrate": {
                "seq_len": 256, "statistics_tokens": STATISTICS_TOKENS,
                "tokens": tokens, **(LONG_WAY if tokens == LONG else {}),
            },
        }  # fmt: skip
        data = str(self.args.model / "calibration.txt")
        result = convert(str(self.args.model), plan=plan, data=data, seed=self.args.seed)
        model = result.model.float().to(self.args.device).eval()
        return model, {"options": options, **self._routes(model)}

    def _routes(self, model: Any) -> dict[str, Any]:
        """On held-out text: what tokens use, and of every layer the busiest and idlest unit."""
        import torch

        from reattend.mixers.routed import RoutedAttention

        mixers = [m for m in model.modules() if isinstance(m, RoutedAttention)]
        seen: list[list[Any]] = [[] for _ in mixers]
        handles = [
            mixer.router.register_forward_hook(
                lambda module, args, routes, into=into: into.append(
                    torch.ones_like(routes.gate_BUN)  # every token uses all
                    if routes.active_BUN is None
                    else routes.active_BUN
                )
            )
            for mixer, into in zip(mixers, seen, strict=True)
        ]
        with torch.no_grad():
            for batch in self.text.batches(4):
                model(**batch)
        for handle in handles:
            handle.remove()
        heads, groups, most, least = 0.0, 0.0, [], []
        for mixer, chosen in zip(mixers, seen, strict=True):
            active = torch.cat(chosen).double()
            used = active.repeat_interleave(mixer.config.heads_per_unit, 1)
            heads += float(used.mean()) / len(mixers)
            each = used.unflatten(1, (mixer.config.core.kv_heads, -1)).amax(2)
            groups += float(each.mean()) / len(mixers)
            by_unit = active.mean((0, 2))[mixer.config.shared :]
            most.append(round(float(by_unit.max()), 3))
            least.append(round(float(by_unit.min()), 3))
        return {"heads_used": heads, "kv_groups_read": groups, "busiest": most, "idlest": least}


def parts(name: str, tokens: int) -> tuple[dict[str, Any], int]:
    """The options of a row, and the tokens it is trained on."""
    for end, trained in ((", untrained", 0), (", long", LONG)):
        if name.endswith(end):
            return ROWS[name.removesuffix(end)], trained
    return ROWS[name], tokens


def names() -> list[str]:
    """Every row, in the table's order."""
    every = [n for name in ROWS for n in (f"{name}, untrained", name)]
    return ["original", *every, "6 of 8 heads on average, fitted, long"]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| a token uses | heads | KV groups read | busiest / idlest routed head | perplexity | KL "
        f"| top-1 | {campaign.RECALL}",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = names()
    for row in sorted(results["rows"], key=lambda row: order.index(row["name"])):
        used = "100 % | 100 % | "
        if "heads_used" in row:
            used = f"{row['heads_used']:.0%} | {row['kv_groups_read']:.0%} | "
            used += f"{max(row['busiest']):.0%} / {min(row['idlest']):.0%}"
        lines.append(
            f"| {row['name']} | {used} | {row['perplexity']:.2f} | {row['kl']:.4f} "
            f"| {row['top1']:.1%} | {campaign.recall_cells(row['recall'])}"
        )
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}; 8 query heads in 2 KV "
        "groups, one group shared, but none in rows that say so or `on average`, nor in "
        "`1 of 2 KV groups`; distilled on "
        f"{results['inputs']['tokens']:,} tokens of calibration.txt, long {LONG:,} "
        f"(`lr: {LONG_WAY['lr']}`); {results['inputs']['rows']} x {TOKENS} held-out "
        "tokens. Used and read: mean over tokens and layers of those; busiest and idlest: shares "
        "of the tokens, over all layers. Gain: nats per key token over the same key never shown. "
        f"Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/moh_table.json")
    parser.add_argument("--tokens", type=int, default=400_000, help="trained on, both stages")
    parser.add_argument(
        "--only", default="", help="parts of the names wanted, separated by slashes"
    )
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("moh_table.py", args, subject.inputs(), "--tokens", str(args.tokens))
    if results is None:
        return 2
    return campaign.fill(results, names(), subject.row, args, table)


if __name__ == "__main__":
    sys.exit(main())
