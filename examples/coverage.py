"""Coverage: find attention in, and convert with `identity`, every architecture of transformers.

    OMP_NUM_THREADS=1 python examples/coverage.py --out examples/results/coverage.json

Every architecture that can be built tiny from its config (`tiny_models.py`), random weights, one
forked process each with a limit of processor time. A row is written as soon as it is measured, so
the same command continues after an interruption; `--shard 1/4` does a quarter; `--only NAME` (a
part of a class name) measures again; `--table` prints the Markdown table of an existing file.
Cores are counted a second way, by watching the model run (`core_count.py`), so what the finder
overlooks is seen.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import tiny_models
from coverage_report import TOLERANCE, reasons, table, total, verified

#: seconds of processor time for one architecture, so that a busy machine changes no row
LIMIT_S = 240
#: tokens of the longest text that is compared: slow rotations have turned by then
LONG = 1023
#: models without softmax attention (or with approximations of it): nothing must be found
NO_ATTENTION = (
    "falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm", "fnet", "mra", "yoso", "mobilevitv2",
    "swiftformer",
)  # fmt: skip


def measure(
    task: str, kind: str, name: str, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """One architecture: what was found, and how far `identity` is from the original.

    `tell` hears the row as it grows, so that what is known outlives a crash.
    """
    row: dict[str, Any] = {"task": task, "kind": kind, "class": name}
    try:
        model = tiny_models.build(kind, name)
    except tiny_models.CannotBuild as problem:
        return row | {"not_built": str(problem)}
    tiny_models.livened(model)
    from core_count import count_cores

    from reattend import find_attention
    from reattend.errors import ReattendError

    row["cores"] = count_cores(model, tiny_models.inputs(model))
    tell(row)
    try:
        found = find_attention(model, given(model))
    except ReattendError as error:
        return row | {"sites": 0, "not_found": f"{error}".splitlines()[0] + why(error)}
    row["sites"] = len(found.sites)
    row["verified"] = sum(s.cores for s in found.sites) + sum(r.verified for r in found.refused)
    row["kinds"] = sorted({site.spec.summary() for site in found.sites})
    for name, proven in (("refused", False), ("proven", True)):
        reasons_of = [r.reason[:160] for r in found.refused if r.verified is proven]
        row[name] = dict(Counter(reasons_of))
    if found.sites:
        tell(row | {"identity": {"error": "it ended without an answer"}})
        try:
            row["identity"] = identity(model, task)
        except Exception as problem:
            row["identity"] = {"error": crashed(problem)}
    return row


def given(model: Any) -> dict[str, Any] | None:
    """Example inputs, where reattend cannot make all of them up."""
    from reattend.inputs import made_up

    wanted = tiny_models.inputs(model)
    return wanted if wanted.keys() != made_up(model).keys() else None


def crashed(problem: BaseException) -> str:
    """An error that is none of reattend's, where it arose."""
    last = traceback.extract_tb(problem.__traceback__)[-1]
    return f"crash: {type(problem).__name__} in {last.name}: {str(problem)[:160]}"


def why(error: Any) -> str:
    """The cause an error names."""
    return f": {error.why}"[:200] if getattr(error, "why", "") else ""


def identity(model: Any, task: str) -> dict[str, Any]:
    """Largest difference on real positions at three shapes and with padding, and generation."""
    import torch

    from reattend import convert
    from reattend.errors import ReattendError

    plan = {"rules": [{"sites": "*", "to": "dense"}], "on_refusal": "keep"}
    try:
        converted = convert(model, plan, inputs=given(model)).model
    except ReattendError as error:
        return {"error": f"{error}".splitlines()[0] + why(error)}
    gaps: dict[str, float] = {}
    shapes = [("a", 2, 23, 0), ("b", 4, 31, 0), ("padded", 2, 23, 5)]
    if (long := longest(model)) > 31:
        shapes.append(("long", 2, long, 0))
    for label, batch, length, padded in shapes:
        inputs = tiny_models.inputs(model, batch, length)
        mask: torch.Tensor | None = inputs.get("attention_mask")
        if padded:
            if mask is None:
                continue
            mask[0, -padded:] = 0
        with torch.no_grad():
            try:
                want = first(model(**inputs))
            except Exception:  # a text of this length is none of the model's
                if label != "long":
                    raise
                continue
            got = first(converted(**inputs))
        if padded and mask is not None and want.shape[:2] == mask.shape:
            want, got = want[mask.bool()], got[mask.bool()]
        scale = float(want[torch.isfinite(want)].abs().max())
        gap = float((want - got).nan_to_num(0.0).abs().max()) / max(scale, 1e-9)
        agree = bool((torch.isfinite(want) == torch.isfinite(got)).all())
        gaps[label] = gap if agree else float("inf")
        if gap > TOLERANCE and label == "long":
            gaps["rounding"] = rounding(model, inputs, want) / max(scale, 1e-9)
    out: dict[str, Any] = {"gaps": {k: float(f"{v:.2e}") for k, v in gaps.items()}}
    if task in ("causal-lm", "seq2seq") and hasattr(model, "generate"):
        out["generate"] = generation(model, converted)
    return out


def rounding(model: Any, inputs: dict[str, Any], want: Any) -> float:
    """How far the original itself, in float64, is from what it says in float32."""
    import torch

    real = {k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    wide = {k: v.double() if k in real else v for k, v in inputs.items()}
    with torch.no_grad():
        return float((first(copy.deepcopy(model).double()(**wide)) - want).abs().max())


def longest(model: Any) -> int:
    """Tokens of the long text: `LONG`, or the positions there are (some begin at 2); 0: none."""
    from reattend.preflight import longest_text

    if "input_ids" not in tiny_models.inputs(model):
        return 0
    return min(LONG, (longest_text(model) or LONG) - 2)


def generation(model: Any, converted: Any) -> str:
    """`equal`, or what differs when both write 12 tokens greedily with a cache."""
    import torch

    from reattend.errors import ReattendError
    from reattend.inputs import made_up

    ids = made_up(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    wanted = {
        "input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    try:
        want = model.generate(**wanted)
    except Exception as problem:
        return f"original cannot: {type(problem).__name__}"
    try:
        got = converted.generate(**wanted)
    except ReattendError as error:
        return f"refused: {f'{error}'.splitlines()[0]}"
    return "equal" if torch.equal(want, got) else "differs"


def first(output: Any) -> Any:
    """Logits where there are any, else the first tensor."""
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output[0]


def isolated(task: str, kind: str, name: str) -> dict[str, Any]:
    """`measure` in a forked process that may die or hang; seconds are of processor time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_S, LIMIT_S))
        signal.alarm(20 * LIMIT_S)  # one that waits for ever uses no processor time
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        row: dict[str, Any] = {"task": task, "kind": kind, "class": name}

        def tell(known: dict[str, Any]) -> None:
            row.update(known)
            os.write(write, json.dumps(known).encode() + b"\n")

        try:
            tell(measure(task, kind, name, tell))
        except BaseException as problem:
            tell(row | {"crash": crashed(problem).removeprefix("crash: ")})
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        lines = told.read().decode().splitlines()
    _, status, used = os.wait4(child, 0)
    row = json.loads(lines[-1]) if lines else {"task": task, "kind": kind, "class": name}
    seconds = round(used.ru_utime + used.ru_stime, 1)
    if os.waitstatus_to_exitcode(status) != 0:
        late = seconds >= LIMIT_S
        reason = f"no answer within {LIMIT_S} s" if late else "the process died"
        row = _cut_short(row, reason)
    return {**row, "seconds": seconds}


def _cut_short(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """What is known of a model whose measurement did not end."""
    if "identity" in row:
        return {**row, "identity": {"error": reason}}
    return {**row, "crash": reason}


def main() -> int:
    """Measure what is missing; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("examples/results/coverage.json"))
    parser.add_argument("--tasks", nargs="*", default=list(tiny_models.TASKS))
    parser.add_argument("--shard", default="1/1", help="k/n: every n-th model, starting at k")
    parser.add_argument("--only", help="measure again the classes whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of the file")
    parser.add_argument("--table", action="store_true", help="print the table of the file")
    parser.add_argument("--reasons", action="store_true", help="print every reason of the file")
    args = parser.parse_args()
    if args.table or args.reasons:
        results = json.loads(args.out.read_text())
        if args.table:
            print(table(results))
        for reason, count, models in reasons(results["rows"]) if args.reasons else ():
            print(f"{count:4d}  {reason}  [{', '.join(sorted(set(models))[:6])}]")
        return 0
    warnings.filterwarnings("ignore")
    import torch
    from transformers.utils import logging

    import reattend.targets.huggingface  # noqa: F401
    from reattend import convert, find_attention  # noqa: F401

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    inputs = {"versions": campaign.versions(), "limit_s": LIMIT_S}
    results = campaign.earlier(args, inputs)
    if results is None:
        return 2
    results = {"inputs": inputs, "command": "python examples/coverage.py", "rows": [], **results}
    results["date"] = datetime.date.today().isoformat()
    results["device"] = campaign.device_name("cpu")
    part, parts = (int(n) for n in args.shard.split("/"))
    todo = [(t, *pair) for t in args.tasks for pair in tiny_models.architectures(t)]
    for task, kind, name in todo[part - 1 :: parts]:
        known = [r for r in results["rows"] if (r["task"], r["class"]) == (task, name)]
        if args.only and args.only not in name:
            continue
        if known and not args.only:
            continue
        row = isolated(task, kind, name) | {"date": datetime.date.today().isoformat()}
        results["rows"] = [r for r in results["rows"] if r not in known] + [row]
        results["rows"].sort(key=lambda r: (r["task"], r["kind"], r["class"]))
        campaign.write(args.out, results)
        print(f"{verified(row):3d}/{total(row):3d}  {name}  {short(row)}", flush=True)
    print(table(results))
    return 0


def short(row: dict[str, Any]) -> str:
    """A row's outcome in a few words."""
    for key in ("not_built", "not_found", "crash"):
        if key in row:
            return f"{key}: {row[key]}"
    return f"{row.get('refused') or ''} {row.get('identity', '')} {row['seconds']} s"


if __name__ == "__main__":
    sys.exit(main())
