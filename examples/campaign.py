"""What the resumable measurement campaigns in this folder share: one JSON file per campaign.

Rows are written as they finish, so the same command continues after an interruption; a file
whose rows depend on other inputs is refused.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any


def arguments(document: str, out: str) -> argparse.ArgumentParser:
    """The options every campaign has."""
    parser = argparse.ArgumentParser(description=document.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=Path("examples/models/pycode-gqa"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--rows", type=int, default=40, help="held-out rows, evenly spaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of the file")
    parser.add_argument("--table", action="store_true", help="print the table of the file")
    return parser


def run(
    args: argparse.Namespace,
    table: Callable[[dict[str, Any]], str],
    measure: Callable[[argparse.Namespace], int],
) -> int:
    """Print the table of a finished file, or measure; errors become their text and exit code."""
    if args.table:
        print(table(json.loads(args.out.read_text())))
        return 0
    from reattend.errors import ReattendError

    try:
        return measure(args)
    except ReattendError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def earlier(args: argparse.Namespace, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The results so far ({} for none); None, with a message, where they are of other inputs."""
    if args.fresh or not args.out.exists():
        return {}
    results: dict[str, Any] = json.loads(args.out.read_text())
    if results["inputs"] == inputs:
        return results
    changed = sorted(key for key in inputs if results["inputs"].get(key) != inputs[key])
    print(
        f"{args.out} holds rows of other inputs ({', '.join(changed)}); pass --fresh or another "
        "--out.",
        file=sys.stderr,
    )
    return None


def begun(
    script: str, args: argparse.Namespace, inputs: dict[str, Any], *more: str
) -> dict[str, Any] | None:
    """The results to continue, with what describes this run; None as `earlier`.

    Args:
        script: the campaign's file.
        args: its arguments.
        inputs: what its rows depend on.
        more: further words of the command that reproduces it.
    """
    results = earlier(args, inputs)
    if results is None:
        return None
    return {
        **results,
        "schema": 1,
        "model": args.model.name,
        "command": shlex.join([*command(script, args), *more]),
        "device": device_name(args.device),
        "versions": versions(),
        "inputs": inputs,
        "rows": results.get("rows", []),
        "date": results.get("date", ""),
    }


def add(results: dict[str, Any], row: dict[str, Any], out: Path) -> None:
    """One more row, dated, written at once."""
    results["date"] = row["date"] = datetime.date.today().isoformat()
    results["rows"].append(row)
    write(out, results)


def fill(
    results: dict[str, Any],
    names: Iterable[str],
    measure: Callable[[str], dict[str, Any]],
    args: argparse.Namespace,
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measure the rows that are missing, writing after each, and print the table.

    `--only`: parts of names, separated by a slash or a comma.
    """
    done = {row["name"] for row in results["rows"]}
    wanted = [part for part in re.split("[/,]", args.only) if part]
    for name in names:
        if name in done or (wanted and not any(part in name for part in wanted)):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        add(results, measure(name), args.out)
    print(table(results))
    return 0


def opened(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model in float32 on its device, in eval mode, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    return model.to(args.device).eval(), AutoTokenizer.from_pretrained(args.model)


def asked(model: Any, name: str, length: int) -> Any:
    """How a row asks its model, as a `Yardstick`: token by token if its name says `decoded`.

    Args:
        model: of the row.
        name: of the row.
        length: tokens of a text.
    """
    from reattend.verify.scoring import cached_scorer
    from reattend.verify.yardsticks import original

    found = original(model, context=length)
    if not name.endswith("decoded"):
        return found
    return replace(found, scorer=cached_scorer(model, chunk=1))


def command(script: str, args: argparse.Namespace) -> list[str]:
    """The command that reproduces a file, without machine paths."""
    return ["python", f"examples/{script}", "--model", shown(args.model), "--out",
            shown(args.out), "--rows", str(args.rows), "--seed", str(args.seed),
            "--device", args.device]  # fmt: skip


def versions() -> dict[str, str]:
    """What the numbers were measured with."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def device_name(device: str) -> str:
    """The device in words."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} thread(s)"


def shown(path: Path) -> str:
    """A path as it belongs in a result: relative, or the bare name where it lies elsewhere."""
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return path.name


#: heads of the columns that `recall_cells` fills
RECALL = "copy: right (nats) | passkey: right (gain) | several keys: right (gain) |"


def recall_cells(recall: dict[str, Any]) -> str:
    """What a row measured of recall on the shipped text, as cells of a Markdown table."""
    copy, *keyed = (recall[kind] for kind in ("copy", "passkey", "multi_key"))
    cells = [(copy["accuracy"], copy["loss"]), *((k["accuracy"], k["gain"]) for k in keyed)]
    return " | ".join(f"{100 * right:.1f} % ({nats:.2f})" for right, nats in cells) + " |"


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file in one step, so an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write(json.dumps(results, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
