"""SparseD on a masked diffusion language model: what near and far tokens tell, in several passes.

    python examples/sparse_diffusion.py

A small bidirectional transformer fills in forms whose blanks near and far tokens tell (`blanks.py`;
trained in a few minutes where `--model` has none). The blanks of a form are filled in an order
drawn at random, some in every pass, each with the likeliest token; all rows have the same order.
The first passes of `sparsed` read everything, so what counts is what the passes behind them fill
in, which read a half or a quarter of all pairs. Every finished row is written at once, so the same
command continues after an interruption. `--table` prints the Markdown table of an existing file and
computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import campaign
from image_patterns import observed
from read_keys import shares

PASSES, BLOCK, BATCH = 16, 8, 32
#: passes of `sparsed` that read everything
DENSE = int(PASSES * observed(1.0)["select"]["skip"]) + 2
#: how far the record of a value is: up to a quarter of the row, up to the half, and farther
APART = (64, 128)
SPANS = ("2-64", "66-128", ">128")


ROWS: dict[str, dict[str, Any]] = {
    "window 50 %": {"window": 75},
    "sparsed 50 %": observed(0.5, BLOCK),
    "window 25 %": {"window": 35},
    "sparsed 25 %": observed(0.25, BLOCK),
    "sparsed 10 %": observed(0.1, BLOCK),
}
ORDER = ("original", *ROWS)


def schedule(blank_BN: Any, passes: int, generator: Any) -> Any:
    """In which pass a blank is filled, from 0, equally many in each; -1 where there is none."""
    import torch

    drawn_BN = torch.rand(blank_BN.shape, generator=generator).masked_fill(~blank_BN, 2.0)
    place_BN = drawn_BN.argsort(1).argsort(1)
    due_BN = place_BN * passes // blank_BN.sum(1, keepdim=True).clamp_min(1)
    return due_BN.masked_fill(~blank_BN, -1)


def filled(model: Any, samples: Any, due_BN: Any) -> tuple[Any, Any]:
    """The rows with their blanks filled in, and what the right token cost there, in nats (B, N).

    Args:
        model: ids -> logits.
        samples: `blanks.Samples`.
        due_BN: the pass of every blank.
    """
    import torch

    ids_BN, nats_BN = samples.shown, torch.zeros(due_BN.shape)
    for number in range(int(due_BN.max()) + 1):
        with torch.no_grad():
            told = model(ids_BN).log_softmax(-1)
        right_BN = told.gather(-1, samples.ids_BN[..., None])[..., 0]
        now_BN = due_BN == number
        nats_BN = torch.where(now_BN, -right_BN, nats_BN)
        ids_BN = torch.where(now_BN, told.argmax(-1), ids_BN)
    return ids_BN, nats_BN


class Campaign:
    """The trained model and the forms it fills in."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from blanks import Texts, trained

        self.args = args
        learned = Texts(args.text / "calibration.txt")
        self.model, self.seconds = trained(learned, args.seed, args.model)
        draw = torch.Generator().manual_seed(args.seed + 10_000)
        self.forms = Texts(args.text / "heldout.txt").forms(args.rows, draw)
        self.due = schedule(self.forms.blank_BN, PASSES, draw)

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / f"text-{self.args.seed}.safetensors"),
            "heldout": campaign.sha256(self.args.text / "heldout.txt"),
            "rows": self.args.rows,
            "passes": PASSES,
            "seed": self.args.seed,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Convert and measure one row."""
        begin = time.perf_counter()
        pattern = ROWS.get(name)
        model = self.converted(pattern) if pattern else self.model
        within = "select" in (pattern or {})
        some = slice(BATCH)

        def run() -> None:
            model(self.forms.part(some).shown)

        def run_all() -> None:
            self.fill(model, some, within)

        found = {
            "name": name, "pattern": pattern, "trained_seconds": round(self.seconds),
            "read": shares(model, self.due.shape[1], run)["attention"],
            "read_in_all": shares(model, self.due.shape[1], run_all)["attention"],
            **self.quality(model, within),
        }  # fmt: skip
        return {**found, "seconds": round(time.perf_counter() - begin, 1)}

    def converted(self, pattern: dict[str, Any]) -> Any:
        """With this pattern in every block."""
        from reattend import convert

        plan = {"rules": [{"sites": "*", "to": "sparse", "pattern": pattern}]}
        return convert(self.model, plan=plan, inputs={"ids": self.forms.shown[:2]}).model.eval()

    def fill(self, model: Any, some: slice, within: bool) -> tuple[Any, Any]:
        """As `filled`, as one text where the passes are to know of each other."""
        from blanks import FORM

        from reattend.denoising import denoising

        with denoising(model, PASSES, FORM) if within else nullcontext():
            return filled(model, self.forms.part(some), self.due[some])

    def quality(self, model: Any, within: bool) -> dict[str, Any]:
        """Of the blanks that are filled behind the passes that read everything."""
        import torch

        firsts = range(0, self.args.rows, BATCH)
        parts = [self.fill(model, slice(n, n + BATCH), within) for n in firsts]
        ids_BN, nats_BN = (torch.cat(x) for x in zip(*parts, strict=True))
        forms, late = self.forms, self.due >= DENSE
        right, apart = ids_BN == forms.ids_BN, forms.distance_BN
        far = late & (apart > 0)
        bins = (apart <= APART[0], (apart > APART[0]) & (apart <= APART[1]), apart > APART[1])

        def mean(of: Any, where: Any) -> float:
            return float(of[where].double().mean())

        near = late & (apart == 0)
        return {
            "near": mean(right, near), "near_nats": mean(nats_BN, near),
            "far": [mean(right, far & inside) for inside in bins],
            "far_nats": [mean(nats_BN, far & inside) for inside in bins],
            "blanks": [int(near.sum()), *(int((far & inside).sum()) for inside in bins)],
        }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| plan | pairs read (in all passes) | near: right (nats) "
        f"| far: right, {' / '.join(SPANS)} | far: nats |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(results["rows"], key=lambda row: ORDER.index(row["name"])):
        far = " / ".join(f"{100 * x:.0f}" for x in row["far"])
        nats = " / ".join(f"{x:.2f}" for x in row["far_nats"])
        lines.append(
            f"| {row['name']} | {100 * row['read']:.0f} % ({100 * row['read_in_all']:.0f} %) "
            f"| {100 * row['near']:.0f} ({row['near_nats']:.2f}) | {far} | {nats} |"
        )
    row = results["rows"][0]
    lines += [
        "",
        f"{results['date']}, {results['device']}; {results['inputs']['rows']} forms of held-out "
        f"text, filled in within {PASSES} passes in an order drawn at random; what is filled in by "
        f"the last {PASSES - DENSE} of them counts ({row['blanks'][0]:,} characters, "
        f"{sum(row['blanks'][1:]):,} values). Percent of blanks filled in as the text has them, "
        "and nats that the text's own token cost then. near: characters of source, told by the "
        "characters around them. far: values of keys, one of 16, by the distance in tokens to the "
        f"record that tells them. sparsed: blocks of {BLOCK} tokens, the prompt's and the form's "
        f"apart; the first {DENSE} passes read everything. window: over the tokens in a row, in "
        f"every pass. The original was trained beside other work in {row['trained_seconds']} s. "
        f"Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/sparse_diffusion.json")
    parser.set_defaults(model=Path("examples/models/blanks"), rows=256)
    parser.add_argument("--text", type=Path, default=Path("examples/models/pycode-gqa"))
    parser.add_argument("--only", default="", help="parts of the names wanted, separated by commas")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("sparse_diffusion.py", args, subject.inputs())
    if results is None:
        return 2
    return campaign.fill(results, ORDER, subject.row, args, table)


if __name__ == "__main__":
    sys.exit(main())
