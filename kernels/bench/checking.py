"""Runs the checks in as many processes as the machine has cores: nearly all is compiling.

What found no memory beside the others is tried once more alone. What time did not suffice for
counts as unproven, which is not right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cases import Case
from correct_families import TRIALS, Trial, trial_error
from correctness import CORRECT, DTYPES, Job, error_of, jobs, title
from huge import HUGE, huge_error
from pools import side_by_side, told
from proofs import UNPROVEN, Key

Check = dict[str, Any]
MEMORY = "out of memory"
LIMIT = 150.0  # seconds for one check, compiling included: one that hangs holds up no other


def poison() -> None:
    """Make uninitialised memory NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


class Listed(NamedTuple):
    """One check: what it is about, its name, what to run."""

    key: Key
    name: str
    job: Any


def listed(ops: Iterable[str]) -> list[Listed]:
    """Every check of these ops, one dtype after the other, that which is timed most first.

    Forward and gradient of a trial are a check each.
    """
    wanted = set(ops)
    every: list[Listed] = []
    for dtype in DTYPES:
        kind = str(dtype)[6:]
        for job in jobs(CORRECT):
            if job[1] == dtype:
                every.append(Listed(Key(job[0].op, kind, "forward"), title(job), job))
        for trial in TRIALS:
            name = f"{trial.op.partition('_')[0]} {trial.name}, {kind}"
            alone = (replace(trial, gradient=False), dtype)
            every.append(Listed(Key(trial.op, kind, "forward"), name, alone))
            if trial.gradient:
                key = Key(trial.op, kind, "backward")
                every.append(Listed(key, f"{name}, backward", (trial, dtype)))
    return [one for one in every if one.key.op in wanted]


def listed_huge(ops: Iterable[str]) -> list[Listed]:
    """Those that fill the device's memory."""
    return [Listed(Key(c.op, c.dtype, "addresses"), c.name, c) for c in HUGE if c.op in set(ops)]


def run_one(job: Job | Case | tuple[Trial, torch.dtype]) -> float | str:
    """In a worker: the error, or why the op did not run."""
    poison()
    try:
        if isinstance(job, Case):
            return huge_error(job, "cuda")
        if len(job) == 2:
            return trial_error(job[0], job[1], "cuda")
        return error_of(job[0], job[1], "cuda", job[2])
    except Exception as error:  # every failure is listed, none hides the others
        return told(error)


def _run(todo: list[Any], deadline: float, workers: int | None = None) -> list[float | str]:
    found: list[float | str] = []
    for outcome in side_by_side(run_one, todo, deadline, workers, LIMIT):
        if outcome is None:
            found.append(UNPROVEN)
        else:
            found.append(outcome.failed or outcome.value)
    return found


def check(wanted: Iterable[Key], deadline: float) -> list[Check]:
    """Run everything about these; rows with the error in units of the allowed one.

    Args:
        wanted: what is to be proven.
        deadline: of `time.monotonic`, after which nothing more begins.
    """
    keys = set(wanted)
    ops = {key.op for key in keys}
    todo = [one for one in listed(ops) if one.key in keys]
    found = _run([one.job for one in todo], deadline)
    short = [i for i, error in enumerate(found) if isinstance(error, str) and MEMORY in error]
    for i, error in zip(short, _run([todo[i].job for i in short], deadline, 1), strict=True):
        found[i] = error
    # one after the other
    huge = [one for one in listed_huge(ops) if one.key in keys]
    found += _run([one.job for one in huge], deadline, 1)
    rows = []
    for one, error in zip([*todo, *huge], found, strict=True):
        ok = isinstance(error, float) and error <= 1.0
        shown = round(error, 4) if isinstance(error, float) else error
        rows.append({**one.key._asdict(), "name": one.name, "error": shown, "ok": ok})
    return rows
