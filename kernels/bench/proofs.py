"""Which kernels may be timed: those whose checks passed, as their sources are now.

A check proves an op's forward or backward in one dtype: a wrong gradient in fp32 says nothing
against the forward in bf16, which is timed all the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from cases import Case

OPS = Path(__file__).parents[1] / "ops"
CHECKS = ("correctness.py", "correct_families.py", "recurrence.py", "huge.py")
#: said of a check that never ran
UNPROVEN = "out of time"
IMPORTED = re.compile(r"reattend\.kernels\.(\w+)")


class Key(NamedTuple):
    """What a check is about: dtypes as in `Case`; ``forward``, ``backward`` or ``addresses``.

    Addresses are those of tensors with more than 2^31 numbers, checked in bf16.
    """

    op: str
    dtype: str
    part: str


def needs(case: Case, part: str) -> set[Key]:
    """What must be proven before a part of a case is timed."""
    keys = {Key(case.op, case.dtype, part)}
    if case.b * max(case.g * case.m, case.h * case.n) * case.d >= 1 << 31:
        keys.add(Key(case.op, "bfloat16", "addresses"))
    return keys


def keys_of(case: Case) -> set[Key]:
    """What must be proven before all of a case is timed."""
    return needs(case, "forward") | (needs(case, "backward") if case.backward else set())


def key_of(row: dict[str, Any]) -> Key:
    """What a row of a report's checks is about."""
    return Key(row["op"], row["dtype"], row["part"])


def timed_as(row: dict[str, Any]) -> Key:
    """What the time of a row of a report's problems is of."""
    return Key(row["op"], row["dtype"], "forward")


def failed(checks: list[dict[str, Any]]) -> set[Key]:
    """What is wrong; not what there was no time to check."""
    return {key_of(row) for row in checks if not row["ok"] and row["error"] != UNPROVEN}


def sources(op: str) -> str:
    """A fingerprint of an op's files, of those it imports, and of the checks."""
    folders, todo = set[str](), [op]
    while todo:
        folder = todo.pop()
        if folder in folders or not (OPS / folder).is_dir():
            continue
        folders.add(folder)
        for path in (OPS / folder).glob("*.py"):
            todo += IMPORTED.findall(path.read_text("utf-8"))
    files = [*OPS.glob("*.py"), *(path for name in folders for path in (OPS / name).glob("*.py"))]
    files += [Path(__file__).with_name(name) for name in CHECKS]
    made = hashlib.sha256()
    for path in sorted(files):
        made.update(path.read_bytes())
    return made.hexdigest()[:16]


def unproven(checks: list[dict[str, Any]], keys: Iterable[Key]) -> dict[Key, str]:
    """What of these may not be timed, and why."""
    wrong = {key_of(row): row["name"] for row in checks if not row["ok"]}
    ran = {key_of(row) for row in checks}
    return {
        key: f"{wrong[key]!r} failed" if key in wrong else "no check ran"
        for key in keys
        if key in wrong or key not in ran
    }
