"""Train a small language model on the standard library's own sources.

    OMP_NUM_THREADS=1 python examples/train_small.py qwen2 --out examples/models/pycode-qwen2
    OMP_NUM_THREADS=1 python examples/train_small.py recall --out examples/models/recall-llama

The shipped model has neither biases nor query and key norms; `qwen2` and `qwen3` have one each, and
so they are where a method meets what the shipped model does not show. In half of their rows a span
comes again later, every second time a span of tokens drawn at random, so that copying heads grow
and need to know where to look. `recall` is a Llama that has to look things up over a thousand
tokens (`recall_rows.py`). Text and tokenizer are those of the shipped model: files that occur in
its `heldout.txt` or `calibration.txt` are left out.

Deterministic for one seed, machine type, thread count and Python version (the sources are Python's
own); `measured.json` beside the weights says what was used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import campaign
from recall_rows import RecallRows, look_back

ROWS, LENGTH, WARM_UP, DECAY = 6, 512, 0.02, 0.5
#: learning rates of matrices (Muon) and of everything else (AdamW)
MATRICES, REST = 0.02, 3e-3
SPAN = (24, 160)
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def sources(text: Path) -> list[str]:
    """The standard library's files, without those of the folder's held-out and calibration text."""
    kept = [(text / name).read_text("utf-8") for name in ("heldout.txt", "calibration.txt")]
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        if "site-packages" in file.parts:
            continue
        try:
            content = file.read_text("utf-8").strip()
        except UnicodeDecodeError:
            continue  # a few test files are in other encodings on purpose
        if len(content) >= 200 and not any(content[:400] in other for other in kept):
            found.append(content)
    return found


@dataclass(frozen=True)
class Stage:
    """A part of the training: its share of the tokens, rows of a batch, tokens of a row.

    `copies`: rows are nothing but random tokens that begin again.
    """

    share: float
    rows: int
    length: int
    copies: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is trained, and on what."""

    model_type: str
    sizes: dict[str, int | bool]
    stages: tuple[Stage, ...]
    tokens: int
    looks_back: bool = False

    def batches(self, tokens: int) -> Iterator[Stage]:
        """The stage of every step."""
        for stage in self.stages:
            steps = math.ceil(stage.share * tokens / (stage.rows * stage.length))
            yield from [stage] * steps


WHOLE = (Stage(1.0, ROWS, LENGTH),)
RECIPES = {
    "qwen2": Recipe("qwen2", SIZES, WHOLE, 2_400_000),
    "qwen3": Recipe("qwen3", SIZES, WHOLE, 2_400_000),
    "recall": Recipe(
        "llama",
        {**SIZES, "hidden_size": 128, "intermediate_size": 256},
        # one thing at a time: to find a token by what came before it, among text, and far away
        (
            Stage(0.15, 32, 32, copies=True),
            Stage(0.12, 32, 64, copies=True),
            Stage(0.08, 8, 256, copies=True),
            Stage(0.15, 8, 256),
            Stage(0.25, 4, 512),
            Stage(0.25, 2, 1024),
        ),
        2_700_000,
        looks_back=True,
    ),
}


class Source(Protocol):
    """Where rows come from."""

    def batch(self, stage: Stage) -> tuple[Any, Any]:
        """(rows, length) token ids, and which of them the loss counts; None: all."""
        ...


class Rows:
    """Rows of token ids from one long stream, some of them repeating themselves."""

    def __init__(self, ids: Any, seed: int) -> None:
        import torch

        self.ids = ids
        self.generator = torch.Generator().manual_seed(seed)

    def _below(self, size: int) -> int:
        import torch

        return int(torch.randint(size, (), generator=self.generator))

    def row(self) -> Any:
        """(LENGTH,) token ids."""
        import torch

        start = self._below(len(self.ids) - LENGTH)
        row_N = self.ids[start : start + LENGTH].clone()
        if self._below(2):
            size = SPAN[0] + self._below(SPAN[1] - SPAN[0])
            first = self._below(LENGTH - 2 * size)
            again = first + size + self._below(LENGTH - first - 2 * size)
            if self._below(2):
                chosen = torch.randint(len(self.ids), (size,), generator=self.generator)
                row_N[first : first + size] = self.ids[chosen]
            row_N[again : again + size] = row_N[first : first + size].clone()
        return row_N

    def batch(self, stage: Stage) -> tuple[Any, Any]:
        """(ROWS, LENGTH) token ids; all of them count."""
        import torch

        return torch.stack([self.row() for _ in range(stage.rows)]), None


def fresh(recipe: Recipe, seed: int) -> Any:
    """The untrained model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(recipe.model_type, **recipe.sizes)
    model = AutoModelForCausalLM.from_config(config)
    if recipe.looks_back:
        look_back(model)
    return model


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, flat, then linearly to nothing."""
    up = (step + 1) / max(1.0, WARM_UP * steps)
    return min(1.0, up, (steps - step) / (DECAY * steps))


def train(model: Any, rows: Source, stages: list[Stage]) -> list[float]:
    """Next-token loss over one batch per stage given; the losses, in nats per token.

    Products run in bfloat16, weights and their updates in float32.
    """
    import torch
    from torch.nn.functional import cross_entropy

    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(inner, lr=MATRICES, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=REST, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    first = [group["lr"] for o in optimizers for group in o.param_groups]
    losses, begin, steps = [], time.perf_counter(), len(stages)
    for step, stage in enumerate(stages):
        share = rate(step, steps)
        for group, lr in zip((g for o in optimizers for g in o.param_groups), first, strict=True):
            group["lr"] = lr * share
        ids_BN, counted_BN = rows.batch(stage)
        taken = slice(None) if counted_BN is None else counted_BN[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden_BND = model.model(input_ids=ids_BN, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden_BND[:, :-1][taken]).flatten(0, -2)
        loss = cross_entropy(logits.float(), ids_BN[:, 1:][taken].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            seconds = time.perf_counter() - begin
            recent = sum(losses[-20:]) / 20
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {seconds:.0f} s", flush=True)
    return losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("kind", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=Path("examples/models/pycode-gqa"))
    parser.add_argument("--tokens", type=int, help="of all batches; default: the kind's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"{args.out} exists; name another folder or delete it.", file=sys.stderr)
        return 2

    import torch
    from transformers import AutoTokenizer

    recipe = RECIPES[args.kind]
    tokens = args.tokens or recipe.tokens
    tokenizer = AutoTokenizer.from_pretrained(args.text)
    files = sources(args.text)
    encoded = tokenizer(files, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([i for ids in encoded for i in (*ids, tokenizer.eos_token_id)])
    print(f"{len(files)} files, {len(stream):,} tokens", flush=True)
    model = fresh(recipe, args.seed)
    stages = list(recipe.batches(tokens))
    rows: Any = Rows(stream, args.seed)
    if args.kind == "recall":
        rows = RecallRows(stream, args.seed)
    begin = time.perf_counter()
    losses = train(model, rows, stages)
    seconds = time.perf_counter() - begin
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    measured = {
        "command": f"python examples/train_small.py {args.kind} --out {campaign.shown(args.out)} "
        f"--tokens {tokens} --seed {args.seed}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": len(stages),
        "tokens": sum(stage.rows * stage.length for stage in stages),
        "corpus_tokens": len(stream),
        "corpus": hashlib.sha256(stream.numpy().tobytes()).hexdigest(),
        "training_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "seconds": round(seconds),
        "device": campaign.device_name("cpu"),
        "versions": campaign.versions(),
    }
    (args.out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
    print(json.dumps(measured, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
