"""`python kernels/bench/sweep.py`: time a grid of configurations of every kernel on this GPU.

The configurations in `reattend.kernels.configs` that are marked as measured are the fastest of
such a sweep. Programs are compiled first, in as many processes as the machine has cores (Triton
keeps them on disk), then timed one after another. Writes ``results/sweep-<device>.json`` after
every problem; `--minutes` ends it early.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import Case
from pools import side_by_side
from problems import Problem, work_of
from record import head, no_gpu, place, write
from registry import SWEEP
from timing import input_sets, replay_ms

from reattend.kernels.configs import KernelConfig
from reattend.kernels.core import Rule

RESULTS = Path(__file__).parent / "results"
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
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


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


def compile_one(job: tuple[Case, KernelConfig]) -> str | None:
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


def sane_splits(case: Case, config: KernelConfig, processors: int) -> Iterator[int]:
    """Splits that make a third of a wave to four and a half, of at least two tiles each."""
    if case.op == "linear_attention":
        yield 1
        return
    rows = case.h // case.g * case.n
    programs = -(-rows // config.rows) * case.g * case.b
    for splits in SPLITS:
        fills = processors / 3 <= programs * splits <= 4.5 * processors
        if (fills and case.m // splits >= 2 * config.keys) or (splits == 1 and programs > 3):
            yield splits


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
    jobs = list(product_of(cases))
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    refused = compile_all(jobs, deadline)
    sys.stdout.write(f"{len(jobs)} programs in {time.monotonic() - began:.0f} s\n")
    report = head("python kernels/bench/sweep.py")
    path = place(report, options.out, "sweep-")
    report["rows"] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    for case in cases:
        if time.monotonic() > deadline:
            sys.stdout.write(f"no time for {case.name}\n")
            continue
        rows, shown = swept(case, refused)
        # cases that are not swept again stay as they were
        report["rows"] = [row for row in report["rows"] if row["case"] != case.name] + rows
        write(report, path)
        sys.stdout.write(f"{case.name:30} {shown}\n")
        sys.stdout.flush()
    sys.stdout.write(f"wrote {path} after {time.monotonic() - began:.0f} s\n")
    return 0


def compile_all(
    jobs: list[tuple[Case, KernelConfig]], deadline: float
) -> dict[tuple[Case, KernelConfig], str | None]:
    """Why each job cannot run, None where it can."""
    futures = side_by_side(compile_one, jobs, deadline)
    return {
        job: future.result() if future.done() and not future.exception() else "did not compile"
        for job, future in zip(jobs, futures, strict=True)
    }


def swept(
    case: Case, refused: dict[tuple[Case, KernelConfig], str | None]
) -> tuple[list[dict[str, Any]], str]:
    """Rows of a case, and its fastest configurations in words."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    problems = [Problem(case, seed) for seed in range(input_sets(work_of(case).bytes))]
    rows: list[dict[str, Any]] = []
    best: list[tuple[float, str]] = []
    for config in grid_of(case):
        row = {"case": case.name, "date": date.today().isoformat(), "config": config.told}
        if refused[case, config] is not None:
            rows.append(row | {"refused": refused[case, config]})
            continue
        tried = sane_splits(case, config, processors) if case.decodes else (1,)
        times = {}
        for splits in tried:
            times[splits] = replay_ms([call_of(x, config, splits) for x in problems], 7)
        rows.append(row | {"ms": {str(k): round(v, 5) for k, v in times.items()}})
        splits = min(times, key=lambda k: times[k])
        chosen = replay_ms([call_of(x, config, None) for x in problems], 7)
        rows[-1]["chosen_ms"] = round(chosen, 5)
        tile = f"{config.rows},{config.keys},{config.warps},{config.stages}"
        best.append((times[splits], f"{tile}/{splits}={times[splits]:.4f}({chosen:.4f})"))
    return rows, "  ".join(text for _, text in sorted(best)[:4])


def product_of(cases: list[Case]) -> Iterator[tuple[Case, KernelConfig]]:
    """Every (case, configuration), slowest compiles first."""
    pairs = [pair for case in cases for pair in product((case,), grid_of(case))]
    yield from sorted(pairs, key=lambda p: -p[1].rows * p[0].d)


if __name__ == "__main__":
    sys.exit(main())
