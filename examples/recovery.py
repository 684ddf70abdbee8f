"""Recovery curves: perplexity after 0, 50k, 200k ... tokens of calibration, by student.

    OMP_NUM_THREADS=1 python examples/recovery.py --model examples/models/pycode-gqa \\
        --out examples/results/recovery.json

Students: the presets `transmla` and `transmla-paper` at several cache sizes, and the dense model
itself (plan `identity`) put through the very same call. Trained by distillation, and, as TransMLA
does, on the plain next-token loss of the same text (`lm`), whose learning rate is chosen first, on
calibration rows held back. The schedule depends on the budget, so each cell is a run of its own.
The rows come in order of what they tell, to be stopped when there are enough. Finished ones are
written at once and training checkpoints lie beside the file (`recovery.work`), so the same command
continues after an interruption. Other inputs than those of the file are refused; `--fresh` starts
again. `--table` prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import copy
import math
import shlex
import shutil
import sys
import time
from typing import Any

import campaign
from recovery_table import (
    LOSSES,
    RATE_ROW,
    RATE_ROWS,
    RECALL_LEN,
    SEQ_LEN,
    STATISTICS,
    STUDENTS,
    best_rate,
    table,
)

TOKENS = (0, 50_000, 200_000, 1_000_000)
#: learning rates tried for `lm`
RATES = (3e-4, 1e-3, 3e-3)
_PLAIN = str.maketrans("", "", " ,%")


def row_names() -> list[tuple[str, int, str]]:
    """Every (student, tokens, loss) of the campaign in order of worth; 0 tokens have no loss.

    By distillation the dense model would stay where it is, at loss 0: it has no such rows.
    """
    rows = [
        (student, count, loss)
        for count in TOKENS
        for loss in (LOSSES if count else LOSSES[:1])
        for student in STUDENTS
        if (student, loss) != ("dense", "distill") or not count
    ]
    return sorted(rows, key=_turn)


def _turn(row: tuple[str, int, str]) -> float:
    """Small budgets first; a quarter of the cache, and distillation, before the others."""
    student, tokens, loss = row
    central = student == "dense" or " 25 %" in student
    delay = {(True, "distill"): 1.0, (True, "lm"): 1.5, (False, "distill"): 2.0}
    return tokens * delay.get((central, loss), 6.0)


class Campaign:
    """Model and data, loaded once; `row(student, tokens, loss)` trains and measures one row."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from reattend.data import load_data

        self.args = args
        self.converted: dict[str, Any] = {}
        self.said: list[Any] = []  # log-probabilities of the original, by batch of held-out rows
        self.work = args.out.with_suffix(".work")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.stored, self.original = (
            AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
            for dtype in ("auto", torch.float32)
        )
        read = {"tokenizer": tokenizer, "seed": args.seed}
        text = args.model / "heldout.txt"
        self.held = load_data(text, seq_len=SEQ_LEN, **read).take(args.rows)
        self.long = load_data(text, seq_len=RECALL_LEN, **read).take(args.rows // 4)
        self.train = load_data(args.model / "calibration.txt", seq_len=SEQ_LEN, **read)

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        from reattend.calibrate import run

        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": self.train.fingerprint,
            "heldout_256": self.held.fingerprint,
            "heldout_512": self.long.fingerprint,
            "rows": self.args.rows,
            "copy_rows": self.long.rows,
            "seed": self.args.seed,
            "lr": {name: stage.lr for name, stage in run.STAGES.items()},
            "rates": list(RATES),
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

    def rates(self) -> dict[str, float]:
        """Perplexity on calibration rows held back, by learning rate of `lm`."""
        from reattend.data import Dataset
        from reattend.verify.quality import perplexity

        name, tokens, loss = RATE_ROW
        ids, mask = self.train.packed
        pick = [n * len(ids) // RATE_ROWS for n in range(RATE_ROWS)]
        left = sorted(set(range(len(ids))) - set(pick))
        back, rest = (
            Dataset([{"input_ids": ids[i], "attention_mask": mask[i]}], description="calibration",
                    seed=self.args.seed)
            for i in (pick, left)
        )  # fmt: skip
        found = {}
        for rate in RATES:
            student = self.student(name)
            self.trained(student, rest, tokens, loss, rate)
            found[f"{rate:g}"] = perplexity(student.float(), back)
        return found

    def trained(
        self, student: Any, data: Any, tokens: int, loss: str, rate: float | None, **more: Any
    ) -> Any:
        """Train the student; the result of every stage."""
        from reattend.calibrate import calibrate
        from reattend.plan_sections import Calibrate

        given = {"tokens": tokens, "seq_len": SEQ_LEN, "loss": loss, "lr": rate}
        settings = Calibrate.model_validate(given)
        return calibrate(
            self.stored, student, data, settings, seed=self.args.seed, on_event=_show, **more
        )

    def row(self, name: str, tokens: int, loss: str, rate: float | None) -> dict[str, Any]:
        """Convert, calibrate, and measure perplexity, agreement and copying."""
        from reattend.workdir import Workdir, digest

        student = self.student(name)
        start, stages, resumed = time.perf_counter(), [], False
        if tokens:
            folder = self.work / f"{name.translate(_PLAIN)}-{tokens}-{loss}"
            key = digest([self.inputs(), name, tokens, loss, rate])
            with Workdir.open(folder, {"row": key}) as workdir:
                resumed = workdir.state == "resumed"
                stages = self.trained(
                    student, self.train, tokens, loss, rate, workdir=workdir, inputs_hash=key
                )
            shutil.rmtree(workdir.partial)
        seconds = time.perf_counter() - start
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
            "quality": self.measured(student.float()),
        }

    def measured(self, student: Any) -> dict[str, Any]:
        """Perplexity and divergence from one pass of the student, and copying."""
        import torch

        from reattend.verify.recall import probes, score
        from reattend.verify.scoring import full_scorer

        nll, kl, scored, tokens = 0.0, 0.0, 0, 0
        with torch.no_grad():
            for number, batch in enumerate(self.held.batches(8)):
                ids = batch["input_ids"].to(self.args.device)  # full rows: no padding
                if number == len(self.said):
                    self.said.append(self.original(input_ids=ids).logits.log_softmax(-1))
                said, guess = self.said[number], student(input_ids=ids).logits.log_softmax(-1)
                nll -= float(guess[:, :-1].gather(-1, ids[:, 1:, None]).double().sum())
                kl += float((said.exp() * (said - guess)).sum(-1).double().sum())
                scored, tokens = scored + ids[:, 1:].numel(), tokens + ids.numel()
        copied = score(
            probes(self.long.packed[0], seed=self.args.seed)["copy"], full_scorer(student)
        )
        return {
            "perplexity": math.exp(nll / scored),
            "kl": kl / tokens,
            "tokens": scored,
            "recall": {"copy": copied.to_dict()},
        }


def _dense_cache(model: Any) -> int:
    c = model.config
    return int(2 * c.num_key_value_heads * c.head_dim)


def _show(event: Any) -> None:
    """One line of progress, overwritten."""
    loss = event.values.get("loss", float("nan"))
    print(f"\r  {event.stage} {event.done}/{event.total} loss {loss:.4f}   ", end="",
          file=sys.stderr, flush=True)  # fmt: skip


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
        if loss == "lm" and "rates" not in results:
            results["rates"] = subject.rates()
            campaign.write(args.out, results)
        rate = best_rate(results["rates"]) if loss == "lm" else None
        row = subject.row(student, tokens, loss, rate)
        print(file=sys.stderr)
        campaign.add(results, row, args.out)
    if results["rows"]:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
