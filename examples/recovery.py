"""Recovery curves: perplexity after 0, 50k, 200k ... tokens of calibration, by student.

    OMP_NUM_THREADS=1 python examples/recovery.py --model examples/models/pycode-gqa \\
        --out examples/results/recovery.json

Students: the presets `transmla` and `transmla-paper` at several cache sizes, and the dense model
itself (plan `identity`) put through the very same call. Trained by distillation, and, as TransMLA
does, on the plain next-token loss of the same text (`lm`). Finished rows are written at once and
training checkpoints lie beside the file (`recovery.work`), so the same command continues after an
interruption. Other inputs than those of the file are refused; `--fresh` starts again. `--table`
prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import shutil
import sys
import time
from typing import Any

import campaign

#: name -> preset and the share of the original cache; None: the dense model itself
STUDENTS: dict[str, tuple[str, float] | None] = {
    "dense": None,
    **{
        f"{preset}, {100 * share:g} %": (preset, share)
        for share in (0.5, 0.25, 0.125)
        for preset in ("transmla", "transmla-paper")
    },
}
TOKENS = (0, 50_000, 200_000, 1_000_000)
#: what is trained on: the distance to the original, or TransMLA's loss
LOSSES = ("distill", "lm")
SEQ_LEN, RECALL_LEN, STATISTICS = 256, 512, 32_768
_PLAIN = str.maketrans("", "", " ,%")


def row_names(tokens: tuple[int, ...] = TOKENS) -> list[tuple[str, int, str]]:
    """Every (student, tokens, loss) of the campaign, cheap ones first; 0 tokens have no loss."""
    return [
        (student, count, loss)
        for count in tokens
        for loss in (LOSSES if count else LOSSES[:1])
        for student in STUDENTS
    ]


class Campaign:
    """Model and data, loaded once; `row(student, tokens, loss)` trains and measures one row."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from reattend.data import load_data

        self.args = args
        self.converted: dict[str, Any] = {}
        self.work = args.out.with_suffix(".work")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.stored, self.original = (
            AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
            for dtype in ("auto", torch.float32)
        )
        read = {"tokenizer": tokenizer, "seed": args.seed}
        text = args.model / "heldout.txt"
        self.held = load_data(text, seq_len=SEQ_LEN, **read).take(args.rows)
        self.long = load_data(text, seq_len=RECALL_LEN, **read).take(args.rows)
        self.train = load_data(args.model / "calibration.txt", seq_len=SEQ_LEN, **read)

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        from reattend.calibrate import run
        from reattend.calibrate.language_model import LanguageModel

        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": self.train.fingerprint,
            "heldout_256": self.held.fingerprint,
            "heldout_512": self.long.fingerprint,
            "rows": self.args.rows,
            "seed": self.args.seed,
            "lr": {
                **{name: stage.lr for name, stage in run.STAGES.items()},
                "lm": LanguageModel.lr,
            },
            "far": {name: stage.far for name, stage in run.STAGES.items()},
            "share": dict(run.SHARE),
        }

    def student(self, name: str) -> Any:
        """The model converted by its preset, in the dtype of the checkpoint, statistics only."""
        from reattend import convert
        from reattend.plan import Plan

        if name not in self.converted:
            asked = STUDENTS[name]
            rule: dict[str, Any] = {"to": "dense"}
            if asked is not None:
                rule = {**Plan.load(asked[0]).rules[0].to_dict(), "kv_keep": asked[1]}
            plan = {
                "rules": [{**rule, "sites": "*"}],
                "calibrate": {"statistics_tokens": STATISTICS, "seq_len": SEQ_LEN},
            }
            result = convert(self.stored, plan=plan, data=self.train, seed=self.args.seed)
            self.converted[name] = result.model
        return copy.deepcopy(self.converted[name])

    def row(self, name: str, tokens: int, loss: str) -> dict[str, Any]:
        """Convert, calibrate, and measure perplexity, agreement and recall."""
        from reattend.calibrate import calibrate
        from reattend.plan_sections import Calibrate
        from reattend.verify.quality import measure
        from reattend.workdir import Workdir, digest

        student = self.student(name)
        start, stages, resumed = time.perf_counter(), [], False
        if tokens:
            given = {"tokens": tokens, "seq_len": SEQ_LEN, "loss": loss}
            settings = Calibrate.model_validate(given)
            folder = self.work / f"{name.translate(_PLAIN)}-{tokens}-{loss}"
            key = digest([self.inputs(), name, tokens, loss])
            with Workdir.open(folder, {"row": key}) as workdir:
                resumed = workdir.state == "resumed"
                stages = calibrate(
                    self.stored, student, self.train, settings, seed=self.args.seed,
                    workdir=workdir, inputs_hash=key, on_event=_show,
                )  # fmt: skip
            shutil.rmtree(workdir.partial)
        seconds = time.perf_counter() - start
        quality = measure(
            student.float(), self.held, self.original, recall_data=self.long, seed=self.args.seed
        )
        asked = STUDENTS[name]
        numbers = _dense_cache(self.original) * (1.0 if asked is None else asked[1])
        return {
            "student": name,
            "tokens": tokens,
            "loss": loss,
            "cache": round(numbers),
            "seconds": None if resumed else round(seconds, 1),  # resumed: only the rest was timed
            "stages": {
                s.name: {
                    "tokens": s.tokens,
                    "loss": [s.loss[0][1], s.loss[-1][1]],
                    "loss_name": s.loss_name,
                }
                for s in stages
            },
            "quality": quality.to_dict(),
        }


def _dense_cache(model: Any) -> int:
    c = model.config
    return int(2 * c.num_key_value_heads * c.head_dim)


def _show(event: Any) -> None:
    """One line of progress, overwritten."""
    loss = event.values.get("loss", float("nan"))
    print(f"\r  {event.stage} {event.done}/{event.total} loss {loss:.4f}   ", end="",
          file=sys.stderr, flush=True)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: one line per student, one column per budget."""
    rows = {  # files of before 2026-11-21 know one loss
        (row["student"], row.get("loss", LOSSES[0]), row["tokens"]): row for row in results["rows"]
    }
    if len(rows) < len(results["rows"]):
        raise ValueError("two rows of one student, one loss and one budget")
    budgets = sorted({tokens for *_, tokens in rows})
    heads = [f"{tokens:,} tokens" for tokens in budgets]
    lines = [
        f"| student | trained on | cache, numbers/token/layer | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(budgets)}",
    ]
    for student, loss in [(student, loss) for student in STUDENTS for loss in LOSSES]:
        # untrained, a student is the same under both losses
        found = [rows.get((student, loss if n else LOSSES[0], n)) for n in budgets]
        if any(row for row, n in zip(found, budgets, strict=True) if n):
            cache = next(row["cache"] for row in found if row)
            cells = " | ".join(_cell(row) for row in found)
            lines.append(f"| {student} | {loss} | {cache} | {cells} |")
    inputs = results["inputs"]
    far = inputs.get("far", {})
    stages = ", ".join(
        f"{n} {100 * share:g} % at lr {inputs['lr'][n]:g}"
        + (f" (less where the first loss is below {far[n]:g})" if far else "")
        for n, share in inputs["share"].items()
    )
    baseline = ""
    if any(loss == "lm" for _, loss, _ in rows):
        baseline = (
            f"lm: the next-token loss alone, end to end at lr {inputs['lr']['lm']:g}, the same "
            "parameters trained. "
        )
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}. Each cell: held-out "
        f"perplexity (KL to the original in nats per token; copy recall right), "
        f"{results['inputs']['rows']} x {SEQ_LEN} tokens; copy at {RECALL_LEN}. Training text: "
        f"calibration.txt, never the held-out one. distill: {stages}. The dense model then stays "
        f"where it is: the loss is the distance to the original, so the text itself teaches "
        f"nothing. {baseline}{_worse(rows)}0 tokens is the conversion alone, from statistics over "
        f"{STATISTICS:,} tokens in the checkpoint's dtype; the table of presets has its own "
        f"statistics, hence slightly other numbers. Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def _worse(rows: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """The students that a training left worse than it found them."""
    cells = []
    for (student, loss, tokens), row in rows.items():
        start = rows.get((student, LOSSES[0], 0))
        if tokens and start:
            before, after = (found["quality"]["perplexity"] for found in (start, row))
            if round(after, 2) > round(before, 2):
                cells.append(
                    f"{student} ({loss}) from {before:.2f} to {after:.2f} after {tokens:,} tokens"
                )
    return f"Training can also lose: {'; '.join(cells)}. " if cells else ""


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    quality = row["quality"]  # nested: it has a `tokens` of its own, those that were scored
    copied = 100 * quality["recall"]["copy"]["accuracy"]
    return f"{quality['perplexity']:.2f} ({quality['kl']:.3f}; {copied:.0f} %)"


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/recovery.json")
    parser.add_argument(
        "--only", default="", help="students whose name contains this; several: with |"
    )
    parser.add_argument("--max-tokens", type=int, default=200_000, help="skip larger budgets")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("recovery.py", args, subject.inputs())
    if results is None:
        return 2
    done = {(row["student"], row["tokens"], row["loss"]) for row in results["rows"]}
    todo = [
        (student, tokens, loss)
        for student, tokens, loss in row_names()
        if (student, tokens, loss) not in done
        and any(part in student for part in args.only.split("|"))
        and tokens <= args.max_tokens
    ]
    reached = max([args.max_tokens, *(tokens for _, tokens, _ in done)])
    results["command"] += f" --max-tokens {reached}"
    if args.only:
        results["command"] += f" --only {shlex.quote(args.only)}"
    for student, tokens, loss in todo:
        print(f"{student}, {tokens} tokens, {loss} ...", file=sys.stderr, flush=True)
        row = subject.row(student, tokens, loss)
        print(file=sys.stderr)
        campaign.add(results, row, args.out)
    if results["rows"]:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
