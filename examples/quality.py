"""Quality at equal cache bytes: the original, its yardsticks, and converted models.

    python examples/quality.py --model examples/models/pycode-gqa \\
        --out examples/results/quality.json

Every finished row is written at once, so the same command continues after an interruption. Other
inputs than those of the file are refused; `--fresh` starts again. `--table` prints the Markdown
table of an existing file and computes nothing. No training happens here.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEEPS = (0.5, 0.25, 0.125)
BITS = (8, 4, 2)
PPL_TOKENS, RECALL_TOKENS = 256, 512


def converted_row(keep: float, args: argparse.Namespace) -> Any:
    """The model converted to MLA at this share of the cache, statistics only."""
    from reattend import convert

    plan = {"rules": [{"sites": "*", "to": "mla", "kv_keep": keep}]}
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
        *(f"MLA {100 * keep:g} %" for keep in KEEPS),
    ]


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
            "weights": _sha256(self.args.model / "model.safetensors"),
            "calibration": _sha256(self.args.model / "calibration.txt"),
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
        from reattend.verify.yardsticks import original, quantised_cache, sliding_window

        for keep in KEEPS:
            if name == f"sliding window {100 * keep:g} %":
                return lambda context: sliding_window(self.model, keep=keep, context=context)
            if name == f"MLA {100 * keep:g} %":
                return self._converted(name, converted_row(keep, self.args))
        for bits in BITS:
            if name == f"int{bits} KV cache":
                return lambda context: quantised_cache(
                    self.model, bits=bits, context=context, backend=self.args.kv_backend
                )
        return lambda context: original(self.model, context=context)

    def _converted(self, name: str, model: Any) -> Callable[[int], Any]:
        """A converted model as it is, with its own cache over the original's."""
        from dataclasses import replace

        from reattend.verify.yardsticks import original

        full = original(self.model, context=1).cache_bytes_per_token

        def ask(context: int) -> Any:
            plain = original(model, context=context)
            return replace(plain, name=name, share=plain.cache_bytes_per_token / full)

        return ask


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | cache bytes/token (share) | perplexity | KL | top-1 "
        "| copy: right (nats) | passkey: right (gain) | several keys: right (gain) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {name: place for place, name in enumerate(row_names())}
    for row in sorted(results["rows"], key=lambda row: order[row["name"]]):
        copy, one, many = (row["recall"][k] for k in ("copy", "passkey", "multi_key"))
        lines.append(
            f"| {row['name']} | {row['cache_bytes_per_token']['256']:.0f} "
            f"({100 * row['share']['256']:.1f} %) | {row['perplexity']:.2f} | {row['kl']:.3f} "
            f"| {100 * row['top1']:.1f} % | {100 * copy['accuracy']:.1f} % ({copy['loss']:.2f}) "
            f"| {100 * one['accuracy']:.1f} % ({one['gain']:.2f}) "
            f"| {100 * many['accuracy']:.1f} % ({many['gain']:.2f}) |"
        )
    rows, backend = results["inputs"]["rows"], results["inputs"]["kv_backend"]
    lines += [
        "",
        f"{results['model']}, {results['date']}, {results['device']}, no training. Perplexity, KL "
        f"to the original and top-1 agreement: {rows} x {PPL_TOKENS} held-out tokens; recall: "
        f"{rows} x {RECALL_TOKENS}; gain: nats per key token over the same key never shown. Cache "
        f"at {PPL_TOKENS} tokens, 2 bytes per number; quantised caches (`{backend}`) with scales, "
        f"zero points and residual. Command: `{results['command']}`",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=Path("examples/models/pycode-gqa"))
    parser.add_argument("--out", type=Path, default=Path("examples/results/quality.json"))
    parser.add_argument("--rows", type=int, default=40, help="held-out rows, evenly spaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv-backend", choices=("minmax", "hqq", "quanto"), default="minmax")
    parser.add_argument("--only", default="", help="rows whose name contains this, comma-separated")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of the file")
    parser.add_argument("--table", action="store_true", help="print the table of the file")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.out.read_text())))
        return 0

    from reattend.errors import ReattendError

    try:
        return _run(args)
    except ReattendError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run(args: argparse.Namespace) -> int:
    """Measure the missing rows, writing after each."""
    import torch
    import transformers

    campaign = Campaign(args)
    inputs = campaign.inputs()
    results = {} if args.fresh or not args.out.exists() else json.loads(args.out.read_text())
    if results and results["inputs"] != inputs:
        changed = sorted(key for key in inputs if results["inputs"].get(key) != inputs[key])
        print(f"{args.out} holds rows of other inputs ({', '.join(changed)}); pass --fresh or "
              "another --out.", file=sys.stderr)  # fmt: skip
        return 2
    words = ["python", "examples/quality.py", "--model", _shown(args.model), "--out",
             _shown(args.out), "--rows", str(args.rows), "--seed", str(args.seed),
             "--device", args.device, "--kv-backend", args.kv_backend]  # fmt: skip
    results = {
        "schema": 1,
        "model": args.model.name,
        "command": shlex.join(words),
        "device": _device(args.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "inputs": inputs,
        "rows": results.get("rows", []),
    }
    done = {row["name"] for row in results["rows"]}
    wanted = [part for part in args.only.split(",") if part]
    for name in row_names():
        if name in done or (wanted and not any(part in name for part in wanted)):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        row = campaign.row(name)
        results["date"] = row["date"] = datetime.date.today().isoformat()
        results["rows"].append(row)
        _write(args.out, results)
    if results["rows"]:
        results["date"] = max(row["date"] for row in results["rows"])
        print(table(results))
    return 0


def _device(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def _shown(path: Path) -> str:
    """A path as it belongs in a result: relative, or the bare name where it lies elsewhere."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step, so an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(json.dumps(results, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
