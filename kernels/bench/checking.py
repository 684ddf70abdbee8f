"""Runs the checks in as many processes as the machine has cores: nearly all is compiling.

A kernel that breaks the device breaks its process for what follows there, so such failures are
tried once more, each alone. What time did not suffice for counts as unproven, which is not right.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from cases import Case
from correct_families import TRIALS, Trial, trial_error
from correctness import CORRECT, DTYPES, HUGE, Job, error_of, huge_error, jobs, title
from pools import side_by_side

Check = dict[str, Any]
#: said of a check that never ran
UNPROVEN = "out of time"


def poison() -> None:
    """Make uninitialised memory NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def listed(ops: Iterable[str]) -> list[tuple[str, str, Any]]:
    """(op, name, what to run) of every check of these ops, one dtype after the other."""
    wanted = set(ops)
    every: list[tuple[str, str, Any]] = []
    for job in jobs(CORRECT):
        every.append((job[0].op, title(job), job))
    for dtype in DTYPES:
        for trial in TRIALS:
            name = f"{trial.op.partition('_')[0]} {trial.name}, {str(dtype)[6:]}"
            every.append((trial.op, name, (trial, dtype)))
    return [one for one in every if one[0] in wanted]


def run_one(job: Job | Case | tuple[Trial, torch.dtype]) -> float | str:
    """In a worker: the error, or why the op did not run."""
    poison()
    try:
        if isinstance(job, Case):
            return huge_error(job)
        if len(job) == 2:
            return trial_error(job[0], job[1], "cuda")
        return error_of(job[0], job[1], "cuda", job[2])
    except Exception as error:  # every failure is listed, none hides the others
        return f"{type(error).__name__}: {str(error)[:300]}"


def _run(todo: list[Any], deadline: float) -> list[float | str]:
    found: list[float | str] = []
    for future in side_by_side(run_one, todo, deadline):
        if not future.done():
            found.append(UNPROVEN)
        elif future.exception() is not None:
            found.append(f"CUDA error: the process died: {future.exception()}")
        else:
            found.append(future.result())
    return found


def check(ops: Iterable[str], deadline: float) -> list[Check]:
    """Run everything about these ops; rows with the error in units of the allowed one.

    Args:
        ops: whose checks.
        deadline: of `time.monotonic`, after which nothing more begins.
    """
    todo = listed(ops)
    found = _run([job for _, _, job in todo], deadline)
    for i, error in enumerate(found):
        if isinstance(error, str) and "CUDA" in error and time.monotonic() < deadline:
            [found[i]] = _run([todo[i][2]], deadline)
    # these fill the device's memory: one after the other
    huge = [(case.op, case.name, case) for case in HUGE if case.op in set(ops)]
    found += [_run([case], deadline)[0] for _, _, case in huge]
    rows = []
    for (op, name, _), error in zip([*todo, *huge], found, strict=True):
        ok = isinstance(error, float) and error <= 1.0
        shown = round(error, 4) if isinstance(error, float) else error
        rows.append({"op": op, "name": name, "error": shown, "ok": ok})
    return rows
