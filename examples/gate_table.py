"""Ways to choose which keys a query reads, at equal density: perplexity and recall in one pass.

    python examples/gate_table.py --out examples/results/gate_table.json

Untrained: a window with sinks, vertical-slash heads (MInference), routing by mean keys (MoBA) and
by attended ones (LongHeads), a gate at its start. Trained: SeerAttention's gate, DHSA's chunks,
DMA's scores of values. The share of keys read is counted on the masks, over held-out rows, not a
budget; what is not made of blocks has the sizes whose counts come nearest. What is trained
learns on `calibration.txt`; held-out text is only measured on. Every
finished row is written at once, so the same command continues after an interruption. `--table`
prints the Markdown table of an existing file and computes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import campaign

TOKENS, STATISTICS_TOKENS, BLOCK, STEPS = 512, 32_768, 16, 500


def window(size: int) -> dict[str, Any]:
    """First and last tokens."""
    return {"sinks": 4, "window": size}


def lines(size: int) -> dict[str, Any]:
    """A vertical-slash head; the released sizes are for prompts of 100,000 tokens."""
    select = {
        "kind": "vertical-slash", "columns": size, "slashes": size, "last_queries": 64,
        "first_columns": min(4, size), "last_slashes": min(16, size),
    }  # fmt: skip
    return {"select": select}


def routed(topk: int) -> dict[str, Any]:
    """Routing by mean keys, over blocks small enough that 512 tokens have some to choose from."""
    return {"select": {"kind": "blocks", "block": BLOCK, "topk": topk}}


def attended(topk: int) -> dict[str, Any]:
    """LongHeads over the same blocks."""
    more = {"key": "attended", "first": 1, "last": 2}
    return {"select": {"kind": "blocks", "block": BLOCK, "topk": topk, **more}}


def chunks(size: int) -> dict[str, Any]:
    """DHSA, with chunks and a window as short as the texts are."""
    select = {"kind": "segments", "topk": size, "longest": 2 * BLOCK, "local": BLOCK}
    return {"select": select}


def scored(size: int) -> dict[str, Any]:
    """DMA."""
    return {"select": {"kind": "values", "topk": size}}


def gate(topk: int) -> dict[str, Any]:
    """A gate over the same blocks."""
    return {"select": {"kind": "gate", "block": BLOCK, "gate_dim": 128, "topk": topk}}


WAYS = {
    "sinks + window": window, "vertical-slash": lines, "mean keys (MoBA)": routed,
    "attended keys (LongHeads)": attended, "gate, untrained": gate, "gate, trained": gate,
    "chunks, trained (DHSA)": chunks, "values, trained (DMA)": scored,
}  # fmt: skip
#: what has a size in tokens, chosen by what it reads; and what is trained
SIZED = ("sinks + window", "vertical-slash", "chunks, trained (DHSA)", "values, trained (DMA)")
#: blocks per query
BUDGETS = (8, 4)
#: name -> way and budget
ROWS = {f"{way}; {k}": (way, k) for k in BUDGETS for way in WAYS}


class Campaign:
    """Model and data, loaded once."""

    def __init__(self, args: argparse.Namespace) -> None:
        from reattend.data import load_data

        self.args = args
        self.model, tokenizer = campaign.opened(args)
        held_out = args.model / "heldout.txt"
        self.text = load_data(held_out, tokenizer, seq_len=TOKENS, seed=args.seed).take(args.rows)
        self.calibration = load_data(
            args.model / "calibration.txt", tokenizer, seq_len=TOKENS,
            tokens=STATISTICS_TOKENS + 32 * TOKENS, seed=args.seed,
        )  # fmt: skip
        self.base: Any = None
        #: by kind of selector: weights of every block's, and what the report says of their training
        self.trained: dict[str, tuple[list[Any], list[Any]]] = {}

    def inputs(self) -> dict[str, Any]:
        """What the rows depend on; a results file of other inputs is not continued."""
        return {
            "weights": campaign.sha256(self.args.model / "model.safetensors"),
            "calibration": self.calibration.fingerprint,
            "heldout": self.text.fingerprint,
            "rows": self.args.rows,
            "seed": self.args.seed,
        }

    def row(self, name: str) -> dict[str, Any]:
        """Convert and measure one row."""
        from reattend.verify.yardsticks import original

        begin, model = time.perf_counter(), self.model
        pattern: Any = None
        if name != "original":
            model = self.converted()
            way, topk = ROWS[name]
            pattern, trained = WAYS[way](topk), ", trained" in way
            if way in SIZED:
                pattern = self.as_dense_as(topk, WAYS[way], trained)
            self.show(pattern, trained=trained)
        seconds = time.perf_counter() - begin
        asked = original(model, context=TOKENS)
        quality = asked.measure(self.text, teacher=self.model, with_recall=False).to_dict()
        recall = {k: v.to_dict() for k, v in asked.recall(self.text, seed=self.args.seed).items()}
        return {
            "name": name, "pattern": pattern, "seconds": round(seconds, 1),
            "learned": self.trained[pattern["select"]["kind"]][1] if ", trained" in name else None,
            "density": density(model, self.text.packed[0]), **quality, "recall": recall,
        }  # fmt: skip

    def converted(self) -> Any:
        """One conversion, whose blocks then get the pattern of every row: the weights are equal."""
        from reattend import convert

        if self.base is None:
            rule = {"sites": "*", "to": "sparse", "pattern": window(BLOCK)}
            self.base = convert(self.model, plan={"rules": [rule]}).model.eval()
        return self.base

    def taught(self, pattern: dict[str, Any]) -> list[Any]:
        """Weights of every block's selector, trained once for each kind."""
        from reattend import convert

        kind = pattern["select"]["kind"]
        if kind not in self.trained:
            rule = {"sites": "*", "to": "sparse", "pattern": pattern, "finder": "gate"}
            plan = {
                "rules": [{**rule, "steps": STEPS}],
                "calibrate": {"seq_len": TOKENS, "statistics_tokens": STATISTICS_TOKENS},
            }
            made = convert(
                self.model, plan=plan, data=self.calibration.packed[0],
                out=self.args.keep and self.args.keep / kind,
            )  # fmt: skip
            weights = [m.selecting.state_dict() for m in sparse_blocks(made.model)]
            told = [
                next(v for v in site.options.values() if str(v).endswith("rows not trained on"))
                for site in made.report.sites
            ]
            self.trained[kind] = weights, told
        return self.trained[kind][0]

    def show(self, pattern: dict[str, Any], *, trained: bool = False) -> None:
        """Give every head this pattern; gates as they start, or as they were trained."""
        from reattend.mixers.sparse_config import SparseConfig

        blocks = sparse_blocks(self.base)
        weights = self.taught(pattern) if trained else [None] * len(blocks)
        for mixer, taught in zip(blocks, weights, strict=True):
            heads = tuple(range(mixer.config.core.kv_heads))
            classes = [{"kv_heads": heads, "pattern": pattern}]
            mixer.begin(
                SparseConfig.model_validate({**mixer.config.model_dump(), "classes": classes})
            )
            kind = pattern.get("select", {}).get("kind")
            if kind is not None:
                mixer.selecting.to(mixer.q_proj.weight)
            if taught is not None:
                mixer.selecting.load_state_dict(taught)
            elif kind == "gate":
                mixer.selecting["0"].start()

    def as_dense_as(self, topk: int, way: Any, trained: bool) -> dict[str, Any]:
        """The size that reads as many keys of a few rows of calibration text as blocks do."""
        rows = self.calibration.packed[0][:4]
        self.show(routed(topk))
        wanted = density(self.base, rows)
        low, high = 1, TOKENS
        while low < high:
            middle = (low + high) // 2
            self.show(way(middle), trained=trained)
            if density(self.base, rows) < wanted:
                low = middle + 1
            else:
                high = middle
        return dict(way(low))


def sparse_blocks(model: Any) -> list[Any]:
    """The converted blocks."""
    from reattend.mixers.sparse import SparseAttention

    return [m for m in model.modules() if isinstance(m, SparseAttention)]


def density(model: Any, ids: Any) -> float:
    """The share of the causal pairs of query and key that is read, over rows, layers and heads."""
    import torch

    from reattend.mixers.scores import own_pattern

    read = every = 0
    for mixer in sparse_blocks(model):
        pattern, core = mixer.config.classes[0].pattern, mixer.config.core
        if pattern.select is None:
            i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
            read += int(pattern.sees(i, j, core).sum())
            every += int(own_pattern(core, i, j).sum())
    if every or not sparse_blocks(model):
        return read / every if every else 1.0
    for mixer in sparse_blocks(model):
        method = mixer.selecting["0"]

        def counted(asked: Any, choose: Any = method.choose) -> Any:
            nonlocal read, every
            chosen = choose(asked)
            i, j = asked.positions()
            own = own_pattern(asked.core, i, j)
            seen = (chosen.mask() | (i == j)) & own
            read += int(seen.sum())
            every += int(own.sum()) * seen[..., 0, 0].numel()
            return chosen

        method.choose = counted
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for mixer in sparse_blocks(model):
        del mixer.selecting["0"].choose
    return read / every


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| keys are chosen by | keys read | perplexity | KL | copy: right (nats) "
        "| passkey: right (gain) | several keys: right (gain) |",
        "|---|---|---|---|---|---|---|",
    ]
    order = ["original", *ROWS]
    for row in sorted(results["rows"], key=lambda row: order.index(row["name"])):
        lines.append(
            f"| {row['name'].partition(';')[0]} | {100 * row['density']:.1f} % "
            f"| {row['perplexity']:.2f} | {row['kl']:.4f} "
            f"| {campaign.recall_cells(row['recall'])}"
        )
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}; "
        f"{results['inputs']['rows']} x {TOKENS} held-out tokens, in one pass. Keys read: counted, "
        f"of the causal ones. Blocks have {BLOCK} tokens; what is trained learns for {STEPS} "
        f"steps on {STATISTICS_TOKENS:,} tokens of calibration.txt, all other weights stay. "
        "Vertical-slash heads choose for a whole text by its last 64 queries. Gain: nats per key "
        f"token over the same key never shown. Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = campaign.arguments(str(__doc__), "examples/results/gate_table.json")
    parser.add_argument("--only", default="", help="parts of the names wanted, separated by commas")
    parser.add_argument("--keep", type=Path, help="folder for the trained model, to continue with")
    return campaign.run(parser.parse_args(argv), table, _run)


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    subject = Campaign(args)
    results = campaign.begun("gate_table.py", args, subject.inputs())
    if results is None:
        return 2
    return campaign.fill(results, ["original", *ROWS], subject.row, args, table)


if __name__ == "__main__":
    sys.exit(main())
