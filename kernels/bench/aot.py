"""`python kernels/bench/aot.py`: compile every shipped kernel for every target, write a report.

Needs no GPU. The report (``kernels/bench/results/aot.json``) is committed. It says of every form of
a kernel what it was compiled from, so only what is new or has changed is compiled again;
``--fresh`` compiles all. With ``--only sparse`` the kernels named so are compiled, with ``--target
sm_90`` those of that target, with ``--usual`` those of `Form.is_usual`; the report's other entries
are kept. ``--check`` compiles nothing and lists what is not up to date. Exit
status 1 when a kernel breaks a limit or the report is not up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import triton

from reattend.kernels.aot import Compiled, compile_form, fingerprint
from reattend.kernels.aot_forms import Form, forms
from reattend.kernels.targets import TARGETS, Target

RESULTS = Path(__file__).parent / "results" / "aot.json"
NAMES = [target.name for target in TARGETS]
Entry = dict[str, Any]
Key = tuple[Any, ...]


def key_of(entry: Entry) -> Key:
    """What form of what kernel an entry is about; entries are in this order."""
    form = (entry["kernel"], entry["element_bytes"], entry["width"], entry["block"])
    return (NAMES.index(entry["target"]), *form, entry["variant"] != "plain")


def form_key(target: Target, form: Form) -> Key:
    """The key of its entry."""
    what = (form.kernel, form.size, form.wide, form.block)
    return (NAMES.index(target.name), *what, form.variant != "plain")


def read(path: Path) -> dict[Key, Entry]:
    """The entries of a report; none where there is no report."""
    if not path.exists():
        return {}
    return {key_of(entry): entry for entry in json.loads(path.read_text("utf-8"))["kernels"]}


def written(compiled: Compiled) -> Entry:
    """As an entry; compile times would change the file at every run."""
    return {k: v for k, v in asdict(compiled).items() if k != "seconds"}


def save(path: Path, entries: list[Entry]) -> None:
    """Write the report, a line for every entry."""
    about = {
        "command": "python kernels/bench/aot.py",
        "date": date.today().isoformat(),
        "triton": triton.__version__,
        "targets": [asdict(t) for t in TARGETS if t.name in {k["target"] for k in entries}],
    }
    lines = ",\n  ".join(json.dumps(entry) for entry in sorted(entries, key=key_of))
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(about, indent=1).removesuffix("\n}")
    path.write_text(f'{head},\n "kernels": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def compile_all(
    todo: list[tuple[Target, Form]], found: dict[Key, Entry], path: Path
) -> list[Entry]:
    """Compile, write the report after each target, print one line for it; returns bad entries."""
    bad = []
    for target in dict.fromkeys(target for target, _ in todo):
        compiled = [compile_form(target, form) for t, form in todo if t == target]
        found |= {key_of(entry): entry for entry in map(written, compiled)}
        save(path, list(found.values()))
        worse = [written(c) for c in compiled if c.problems]
        seconds = sum(c.seconds for c in compiled)
        sys.stdout.write(
            f"{target.name}: {len(compiled)} kernels, {len(worse)} over a limit, {seconds:.0f} s\n"
        )
        bad += worse
    return bad


def main() -> int:
    """Compile what is asked; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file to write")
    parser.add_argument("--target", choices=NAMES, nargs="+", default=NAMES, help="default: all")
    parser.add_argument("--only", default="", help="kernels whose names begin so")
    parser.add_argument("--usual", action="store_true", help="as wide as their class only")
    parser.add_argument("--fresh", action="store_true", help="also what has not changed")
    parser.add_argument("--check", action="store_true", help="list what is not up to date")
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("unset TRITON_INTERPRET: the interpreter replaces the compiler\n")
        return 2
    every = [(target, form) for target in TARGETS for form in forms(target.name)]
    wanted = {form_key(*pair) for pair in every}
    found = {key: entry for key, entry in read(asked.out).items() if key in wanted}
    todo = [
        (target, form)
        for target, form in every
        if target.name in asked.target and form.kernel.startswith(asked.only)
        if form.is_usual or not asked.usual
        if asked.fresh or not _is_current(found.get(form_key(target, form)), target, form)
    ]
    if asked.check:
        for target, form in todo:
            sys.stdout.write(f"not up to date: {form_key(target, form)}\n")
        return 1 if todo else 0
    bad = compile_all(todo, found, asked.out)
    for entry in bad:
        sys.stdout.write(f"  {' '.join(map(str, key_of(entry)))}: {entry['problems']}\n")
    sys.stdout.write(f"{asked.out}: {len(found)} kernels, {len(todo)} of them compiled now\n")
    return 1 if any(entry["problems"] for entry in found.values()) else 0


def _is_current(entry: Entry | None, target: Target, form: Form) -> bool:
    """Whether an entry is of these very tiles and sources."""
    told = None if entry is None else (entry.get("source"), entry["config"])
    return told == (fingerprint(target, form), form.config.told)


if __name__ == "__main__":
    sys.exit(main())
