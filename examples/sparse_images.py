"""Sparse presets for models without a cache: what they lose on pictures and videos they never saw.

    python examples/sparse_images.py

Small transformers of pictures, of videos and of longer videos learn questions about near and about
far tokens (`near_far.py`; a few minutes each, where `--weights` has none). Every row converts one
anew, sized to read about a half or a quarter of all pairs (`image_patterns.py`), which are counted,
and measures on samples of other seeds; what reads least of a preset also after short trainings
(`calibrate`), block by block and end to end. Every finished row is written at once, so the same
command continues after an interruption. `--table` prints the Markdown table of an existing file and
computes nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

import campaign
from image_patterns import APART, NEAR, ORDER, PATTERNS, SHARES, STAGES
from read_keys import shares

HELD, COUNTED, TRAINED, BATCH, BATCHES, STEPS = 256, 16, 512, 16, 32, 200
#: of `sparsed`, over one sample from which noise goes away
PASSES = 6


class Field:
    """A trained encoder, what it is measured on and what its blocks may train on."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        import torch
        from near_far import FIELDS, trained

        self.field = FIELDS[name]
        self.model, self.seconds = trained(self.field, args.seed, args.weights)
        weights = b"".join(x.numpy().tobytes() for x in self.model.state_dict().values())
        self.weights = sha256(weights).hexdigest()
        draw = torch.Generator().manual_seed(args.seed + 10_000)
        self.held = self.field.draw(HELD, draw)
        self.data = [{"pixels": self.field.draw(BATCH, draw).pixels} for _ in range(BATCHES)]
        self.expected = self.answers(self.model)

    def answers(self, model: Any, passes: int = 1) -> Any:
        """Logits of the tokens that are asked, in the last pass: the others are over noise."""
        import torch

        from reattend.denoising import denoising

        draw, parts = torch.Generator().manual_seed(0), []
        for pixels in self.held.pixels.split(BATCH):
            noise = torch.randn(pixels.shape, generator=draw)
            with torch.no_grad(), denoising(model, passes) if passes > 1 else nullcontext():
                for left in reversed(range(passes)):
                    got = model(pixels + left / passes * noise)
            parts.append(got)
        return torch.cat(parts)[self.held.asked]

    def converted(self, pattern: dict[str, Any], stage: str = "") -> Any:
        """With this pattern in every block, trained in this stage."""
        from reattend import convert

        select = pattern.get("select", {})
        rule: dict[str, Any] = {"sites": "*", "to": "sparse", "pattern": pattern}
        if "window" not in pattern and select.get("kind") != "observed":
            rule["image_grid"] = list(self.field.grid)
        if select.get("kind") == "low-rank":
            rule |= {"finder": "gate", "steps": STEPS}
        plan: dict[str, Any] = {"rules": [rule]}
        if stage:
            plan["calibrate"] = {"tokens": TRAINED, "stages": [stage], "batch_size": BATCH}
        inputs = {"pixels": self.data[0]["pixels"][:2]}
        data = self.data if stage or "finder" in rule else None
        return convert(self.model, plan=plan, inputs=inputs, data=data).model.eval()

    def read(self, model: Any) -> float:
        """The share of all pairs that is read, counted on some samples."""

        def run() -> None:
            model(self.held.pixels[:COUNTED])

        return shares(model, math.prod(self.field.grid), run)["attention"]

    def quality(self, model: Any, passes: int = 1) -> dict[str, Any]:
        """Against the answers, and against the original."""
        asked, got, want = self.held.asked, self.answers(model, passes), self.expected
        right = got.argmax(-1) == self.held.answers_BN2[asked]
        apart = self.held.distance_BN[asked]
        first, second = APART[self.field.name]
        bins = (apart <= first, (apart > first) & (apart <= second), apart > second)
        p, q = want.log_softmax(-1), got.log_softmax(-1)
        return {
            "near": float(right[:, 0].float().mean()),
            "far": [float(right[inside, 1].float().mean()) for inside in bins],
            "kl": float((p.exp() * (p - q)).sum(-1).mean()),
            "error": float((got - want).norm() / want.norm()),
        }


class Campaign:
    """The fields, trained when first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.fields: dict[str, Field] = {}

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {"seed": self.args.seed, "held": HELD, "trained": TRAINED}

    def field(self, name: str) -> Field:
        """Trained."""
        if name not in self.fields:
            self.fields[name] = Field(name, self.args)
        return self.fields[name]

    def row(self, name: str) -> dict[str, Any]:
        """Convert and measure one row."""
        begin = time.perf_counter()
        where, _, what = name.partition(": ")
        field = self.field(where)
        found: dict[str, Any] = {
            "name": name, "trained_seconds": round(field.seconds), "weights": field.weights,
        }  # fmt: skip
        if what == "original":
            return {**found, "read": 1.0, **field.quality(field.model)}
        preset, share, *_ = what.split()
        stage = STAGES.get(what.partition(", ")[2], "")
        pattern = PATTERNS[where][preset][SHARES.index(int(share))]
        if preset == "vmoba":
            pattern = self.sized(field.converted(pattern), field, pattern, int(share) / 100)
        model = field.converted(pattern, stage)
        passes = PASSES if preset == "sparsed" else 1
        found |= {"pattern": pattern, "read": field.read(model), **field.quality(model, passes)}
        return {**found, "seconds": round(time.perf_counter() - begin, 1)}

    def sized(
        self, model: Any, field: Field, pattern: dict[str, Any], share: float
    ) -> dict[str, Any]:
        """VMoBA with the share of similarity that reads this share of the pairs."""
        from reattend.mixers.sparse import SparseAttention

        low, high = 0.0, 1.0
        for _ in range(7):
            middle = (low + high) / 2
            for mixer in (m for m in model.modules() if isinstance(m, SparseAttention)):
                given = mixer.config.model_dump()
                given["classes"][0]["pattern"]["select"]["topp"] = middle
                mixer.begin(type(mixer.config).model_validate(given))
            low, high = (middle, high) if field.read(model) < share else (low, middle)
        return {"select": {**pattern["select"], "topp": round(high, 4)}}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a table per field."""
    rows = sorted(results["rows"], key=lambda row: ORDER.index(row["name"]))
    lines: list[str] = []
    took: dict[str, float] = {}
    for row in rows:
        field = row["name"].partition(":")[0]
        if field not in took:
            first, second = APART[field]
            spans = f"1-{first} / {first + 1}-{second} / >{second}"
            lines += [
                "",
                f"| plan | pairs read | near | far, {spans} | KL | error |",
                "|---|---|---|---|---|---|",
            ]
        took[field] = row["trained_seconds"]
        far = " / ".join(f"{100 * x:.0f}" for x in row["far"])
        lines.append(
            f"| {row['name']} | {100 * row['read']:.0f} % | {100 * row['near']:.0f} | {far} "
            f"| {row['kl']:.3f} | {row['error']:.2f} |"
        )
    inputs = results["inputs"]
    learned = ""
    if any(", trained" in row["name"] for row in rows):
        learned = (
            "trained: every block against the original's own, or end to end against what the "
            f"original answers, on {inputs['trained']} samples, which have no answers. "
        )
    lines += [
        "",
        f"{results['date']}, {results['device']}; {inputs['held']} samples that were not trained "
        "on. Percent of answers that are right, of four possible ones, asked of tokens (there is "
        f"no class token). near: {' or '.join(NEAR[field] for field in took)}. far: the kind of "
        "the key of its colour, by the distance to it in tokens, or frames. KL and relative "
        "error: of the answers, against the original's. window: over the tokens in a row. "
        f"sparsed: the last of {PASSES} passes, over samples from which noise goes away; the "
        f"blocks are those that the third one looked at. {learned}The originals were trained "
        "beside other work in "
        + ", ".join(f"{seconds} s ({name})" for name, seconds in took.items())
        + f". Command: `{results['command']}`",
    ]
    return "\n".join(lines[1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("examples/results/sparse_images.json"))
    parser.add_argument("--weights", type=Path, default=Path("examples/models/near-far"),
                        help="folder of the encoders; trained where it has none")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="forget the rows of the file")
    parser.add_argument("--table", action="store_true", help="print the table of the file")
    parser.add_argument("--only", default="", help="parts of the names wanted, separated by commas")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    inputs = subject.inputs()
    results = campaign.earlier(args, inputs)
    if results is None:
        return 2
    results = {
        "rows": [],
        **results,
        "command": f"python examples/sparse_images.py --out {campaign.shown(args.out)} "
        f"--seed {args.seed}",
        "device": campaign.device_name("cpu"),
        "versions": campaign.versions(),
        "inputs": inputs,
    }
    names = sorted(ORDER, key=lambda name: ", trained" in name)  # what takes longest is last
    return campaign.fill(results, names, subject.row, args, table)


if __name__ == "__main__":
    sys.exit(main())
