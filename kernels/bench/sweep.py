"""`python kernels/bench/sweep.py`: time a grid of configurations of every kernel on this GPU.

The configurations in `reattend.kernels.configs` that are marked as measured are the fastest of
such a sweep. Some cases' programs are compiled, in as many processes as the machine has cores
(Triton keeps them on disk), then timed one after another in a process that is replaced where one
breaks it; then the next cases'. Writes ``results/sweep-<device>.json`` after every problem;
`--minutes` ends it early, and what it had no time for stays as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import Case
from checking import MEMORY
from pools import LATE, each_ended, side_by_side
from problems import Problem, work_of
from record import head, no_gpu, place, write
from registry import SWEEP
from splits import sane_splits
from timing import input_sets, replay_ms

from reattend.kernels.configs import KernelConfig
from reattend.kernels.core import Rule

RESULTS = Path(__file__).parent / "results"
COMPILE_SHARE = 0.5  # of the time that is left, before what compiled is timed
COMPILE_LIMIT, TIME_LIMIT = 200.0, 60.0  # seconds for one configuration
Job = tuple[Case, KernelConfig]
Tile = tuple[int, ...]
# (rows, keys, warps, stages[, programs a multiprocessor holds]) that compile for sm_90
GRID: dict[str, tuple[Tile, ...]] = {
    "attention prefill 64": (
        (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 128, 4, 2),
    ),
    "attention prefill 128": (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2),
        (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 3), (128, 32, 8, 4),
    ),
    "attention prefill 256": ((128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (128, 64, 8, 2)),
    "attention decode 64": (
        (16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 4), (16, 64, 2, 4), (16, 128, 2, 3),
        (16, 256, 4, 2),
    ),
    "attention decode 128": (
        (16, 64, 4, 3), (16, 64, 4, 4), (16, 128, 4, 2), (16, 128, 4, 3), (16, 64, 2, 3),
        (16, 128, 8, 2), (16, 128, 8, 3), (16, 32, 2, 4), (16, 64, 2, 4),
    ),
    "attention decode 256": ((16, 32, 4, 3), (16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 8, 3)),
    "latent prefill 512": (
        (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 3), (32, 64, 8, 2), (32, 32, 8, 3),
    ),
    "latent prefill 256": ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 3), (64, 64, 4, 3)),
    "latent prefill 128": ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    "latent decode 128": (
        (16, 64, 4, 4), (16, 128, 4, 3), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 4, 2),
    ),
    "latent decode 512": (
        (16, 32, 4, 3, 2), (16, 64, 4, 2, 2), (16, 64, 8, 3), (32, 32, 4, 2, 2), (32, 32, 4, 3, 2),
        (32, 64, 4, 2, 2), (64, 64, 8, 2),
    ),
    "latent decode 256": (
        (16, 64, 4, 3, 2), (32, 64, 4, 3, 2), (32, 64, 4, 2, 2), (32, 128, 4, 2), (64, 64, 4, 2),
        (64, 64, 8, 3),
    ),
    "attention prefill 128 dq": (
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 32, 8, 3),
        (64, 128, 8, 2),
    ),
    "attention prefill 128 dkv": (
        (32, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2),
        (16, 128, 8, 3), (64, 32, 8, 3),
    ),
    "attention prefill 64 dq": ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)),
    "attention prefill 64 dkv": (
        (32, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2),
    ),
    "latent prefill 512 dq": (
        (64, 32, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 16, 2), (32, 32, 8, 2),
        (32, 64, 8, 2),
    ),
    "latent prefill 512 dkv": (
        (32, 64, 8, 2), (32, 64, 8, 1), (16, 64, 8, 2), (32, 64, 16, 2), (32, 32, 8, 2),
    ),
    "latent prefill 256 dq": (
        (64, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 8, 3),
    ),
    "latent prefill 256 dkv": (
        (32, 64, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 64, 8, 3),
    ),
    "latent prefill 512 kept": ((32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 2), (16, 64, 8, 2)),
    "latent prefill 256 kept": ((64, 64, 8, 2), (32, 64, 8, 2), (32, 128, 8, 2), (64, 32, 8, 2)),
    "sparse prefill 64": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 4)),
    "sparse prefill 128": ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 3), (64, 32, 4, 4)),
    "sparse decode 128": (
        (16, 64, 4, 4), (16, 64, 4, 3), (16, 64, 2, 4), (16, 64, 4, 3, 2), (16, 32, 4, 4),
    ),
    "routed prefill 128": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
    "routed decode 128": ((16, 64, 4, 4), (16, 64, 4, 3), (16, 128, 4, 3), (16, 64, 2, 4)),
    "linear prefill 128": (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2), (64, 64, 8, 2),
        (128, 64, 8, 2), (32, 64, 4, 3),
    ),
    "linear decode 128": ((1, 32, 4, 1), (1, 64, 4, 1), (1, 16, 4, 1), (1, 32, 2, 1)),
}  # fmt: skip


def is_gradient(case: Case) -> bool:
    """Whether kernels of a gradient are swept."""
    return case.backward and case.op in ("attention", "latent_attention")


def grid_of(case: Case) -> Iterator[KernelConfig]:
    """Configurations that may run a case; of a gradient, of the kernel that ends its name."""
    part = case.name.rpartition(" ")[2]
    for tile in GRID[f"{case.kernel} {part}" if is_gradient(case) else case.kernel]:
        yield KernelConfig(*tile)


def call_of(problem: Problem, config: KernelConfig, splits: int | None) -> Any:
    """One launch."""
    case, data, rest = problem.case, problem.data, problem.rest
    launch = import_module(f"reattend.kernels.{case.op}.launch")
    rule = Rule((case.d + case.rope) ** -0.5, True, 0, 0.0)
    if is_gradient(case):
        return gradient_call(problem, config, rule)
    if case.op == "linear_attention":
        configs = dict.fromkeys((*launch.KERNELS, "channels"), config)
        return lambda: launch.launch(launch.Inputs(*data, *rest[:3]), configs)
    if case.op == "sparse_attention":
        given = launch.Inputs(*data, rest[:5], rest[5:7], *rest[7:9])
        return lambda: launch.launch(given, rule, config, splits=splits)
    if case.op == "routed_attention":
        given = launch.Inputs(*data, *rest)
        return lambda: launch.launch(given, rule, config, splits=splits)
    return lambda: launch.launch(*data, *rest, None, rule, config, splits=splits)


def gradient_call(problem: Problem, config: KernelConfig, rule: Rule) -> Any:
    """Both kernels of a gradient: one in this configuration, the other as shipped.

    Where what the first computes is kept, it is that of the cache.
    """
    launch = import_module(f"reattend.kernels.{problem.case.op}.launch_backward")
    problem.backward()
    assert problem.kept is not None
    dy, dlse, y, lse = problem.kept
    shipped = launch.configs_for(problem.data[0], problem.data[-1]) or (config, config)
    dq = problem.case.name.endswith("dq")
    configs = (config, shipped[1]) if dq else (shipped[0], config)
    given = (*problem.data, *problem.rest)
    if problem.case.name.endswith("kept"):
        keeping = import_module("reattend.kernels.latent_attention.launch_kept")
        return lambda: keeping.launch_kept((dy, dlse), (y, lse), given, rule, configs)
    return lambda: launch.launch_backward((dy, dlse), (y, lse), given, rule, configs)


def compile_one(job: Job) -> str | None:
    """In a worker: compile by running once. Returns why it cannot run."""
    case, config = job
    torch.cuda.empty_cache()
    problem = Problem(case)
    try:
        for splits in (1, 3, 16) if case.decodes else (1,):  # 1 and 16 are special to Triton
            call_of(problem, config, splits)()
        torch.cuda.synchronize()
    except Exception as error:  # too many registers or too much shared memory is a result
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def main() -> int:
    """Compile, time, write, print the best of every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--only", default="", help="cases whose name holds one of these, by commas")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        return no_gpu("run this on a machine with one; kernels/bench/aot.py compiles without")

    cases = [case for case in SWEEP if any(text in case.name for text in options.only.split(","))]
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    report = head("python kernels/bench/sweep.py")
    path = place(report, options.out, "sweep-")
    report["rows"] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    for some in portions(cases):
        if time.monotonic() > deadline:
            sys.stdout.write(f"no time for {'; '.join(case.name for case in some)}\n")
            continue
        left = deadline - time.monotonic()
        compiled = compile_all(list(product_of(some)), time.monotonic() + COMPILE_SHARE * left)
        for case in some:
            rows, shown = swept(case, compiled, deadline)
            # what is not swept again stays as it was
            anew = [row["config"] for row in rows]
            report["rows"] = [
                row
                for row in report["rows"]
                if row["case"] != case.name or row["config"] not in anew
            ] + rows
            write(report, path)
            sys.stdout.write(f"{case.name:30} {shown}\n")
            sys.stdout.flush()
    sys.stdout.write(f"wrote {path} after {time.monotonic() - began:.0f} s\n")
    return 0


def portions(cases: list[Case]) -> Iterator[list[Case]]:
    """Cases that are compiled together, then timed: programs that keep all cores busy."""
    some: list[Case] = []
    for case in cases:
        some.append(case)
        if sum(1 for _ in product_of(some)) >= 2 * (os.cpu_count() or 1):
            yield some
            some = []
    if some:
        yield some


def compile_all(jobs: list[Job], deadline: float) -> dict[Job, str]:
    """Why each job cannot run, empty where it can; without those that time did not suffice for."""
    found: dict[Job, str] = {}
    outcomes = side_by_side(compile_one, jobs, deadline, limit=COMPILE_LIMIT)
    for job, outcome in zip(jobs, outcomes, strict=True):
        if outcome is not None and not outcome.failed.startswith(LATE):
            why = outcome.failed or outcome.value or ""
            found[job] = "" if MEMORY in why else why  # alone on the device there may be enough
    return found


@lru_cache(maxsize=1)
def problems_of(case: Case) -> list[Problem]:
    """In the process that times: several input sets."""
    return [Problem(case, seed) for seed in range(input_sets(work_of(case).bytes))]


def time_one(job: Job) -> dict[str, Any]:
    """In a worker: milliseconds by number of splits, and as `best_splits` chooses."""
    case, config = job
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tried = sane_splits(case, config, processors) if case.decodes else (1,)
    found = {
        str(splits): round(replay_ms([call_of(x, config, splits) for x in problems_of(case)], 7), 5)
        for splits in tried
    }
    chosen = replay_ms([call_of(x, config, None) for x in problems_of(case)], 7)
    return {"ms": found, "chosen_ms": round(chosen, 5)}


def swept(
    case: Case, compiled: dict[Job, str], deadline: float
) -> tuple[list[dict[str, Any]], str]:
    """Rows of a case, and its fastest configurations in words."""
    told = {"case": case.name, "date": date.today().isoformat()}
    jobs = [(case, config) for config in grid_of(case) if (case, config) in compiled]
    rows = [
        told | {"config": job[1].told, "refused": compiled[job]} for job in jobs if compiled[job]
    ]
    jobs = [job for job in jobs if not compiled[job]]
    best: list[tuple[float, str]] = []
    for index, outcome in each_ended(time_one, jobs, deadline, 1, TIME_LIMIT):
        config = jobs[index][1]
        row = told | {"config": config.told}
        rows.append(row | (outcome.value or {"refused": outcome.failed}))
        if outcome.value and outcome.value["ms"]:
            ms, chosen = outcome.value["ms"], outcome.value["chosen_ms"]
            splits = min(ms, key=lambda k: ms[k])
            tile = f"{config.rows},{config.keys},{config.warps},{config.stages}"
            best.append((ms[splits], f"{tile}/{splits}={ms[splits]:.4f}({chosen:.4f})"))
    late = sum(1 for _ in grid_of(case)) - len(rows)
    shown = [text for _, text in sorted(best)[:4]] + [f"no time for {late}"] * bool(late)
    return rows, "  ".join(shown)


def product_of(cases: list[Case]) -> Iterator[Job]:
    """Every (case, configuration), slowest compiles first."""
    pairs = [pair for case in cases for pair in product((case,), grid_of(case))]
    yield from sorted(pairs, key=lambda p: -p[1].rows * p[0].d)


if __name__ == "__main__":
    sys.exit(main())
