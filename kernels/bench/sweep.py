"""`python kernels/bench/sweep.py`: time a grid of configurations of every kernel on this GPU.

The configurations in `reattend.kernels.configs` that are marked as measured are the fastest of
such a sweep. Programs are compiled first, in as many processes as the machine has cores (Triton
keeps them on disk), then timed one after another. Writes ``results/sweep-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import SWEEP, Case, bytes_of, tensors
from record import head, place, write
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
}  # fmt: skip
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def grid_of(case: Case) -> Iterator[KernelConfig]:
    """Configurations that may run a case."""
    for tile in GRID[case.kernel]:
        yield KernelConfig(*tile)


def launcher(case: Case) -> Any:
    """The launch module of a case's op."""
    if case.op == "attention":
        from reattend.kernels.attention import launch
    else:
        from reattend.kernels.latent_attention import launch  # type: ignore[no-redef]
    return launch


def call_of(case: Case, config: KernelConfig, splits: int | None, inputs: tuple[Any, ...]) -> Any:
    """One launch."""
    rule = Rule((case.d + case.rope) ** -0.5, True, 0, 0.0)
    module = launcher(case)
    return lambda: module.launch(*inputs, None, rule, config, splits=splits)


def full_inputs(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Inputs with every row of the cache in use."""
    start = torch.zeros(case.b, dtype=torch.int64, device="cuda")
    made = tensors(case, torch.bfloat16, "cuda", seed)
    return (*made, start, start + case.m)


def compile_one(job: tuple[Case, KernelConfig]) -> str | None:
    """In a worker: compile by running once. Returns why it cannot run."""
    case, config = job
    torch.cuda.empty_cache()
    inputs = full_inputs(case)
    try:
        for splits in (1, 3, 16) if case.decodes else (1,):  # 1 and 16 are special to Triton
            call_of(case, config, splits, inputs)()
        torch.cuda.synchronize()
    except Exception as error:  # too many registers or too much shared memory is a result
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def sane_splits(case: Case, config: KernelConfig, processors: int) -> Iterator[int]:
    """Splits that make a third of a wave to four and a half, of at least two tiles each."""
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
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("no GPU: a sweep measures one\n")
        return 5

    cases = [case for case in SWEEP if any(text in case.name for text in options.only.split(","))]
    jobs = list(product_of(cases))
    began = time.perf_counter()
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        refused = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    sys.stdout.write(f"{len(jobs)} programs in {time.perf_counter() - began:.0f} s\n")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    rows: list[dict[str, Any]] = []
    for case in cases:
        sets = [full_inputs(case, seed) for seed in range(input_sets(bytes_of(case)))]
        best: list[tuple[float, str]] = []
        for config in grid_of(case):
            day = date.today().isoformat()
            row = {"case": case.name, "date": day, "config": asdict(config)}
            if refused[case, config] is not None:
                rows.append(row | {"refused": refused[case, config]})
                continue
            tried = sane_splits(case, config, processors) if case.decodes else (1,)
            times = {}
            for splits in tried:
                times[splits] = replay_ms([call_of(case, config, splits, x) for x in sets], 7)
            rows.append(row | {"ms": {str(k): round(v, 5) for k, v in times.items()}})
            splits = min(times, key=lambda k: times[k])
            chosen = replay_ms([call_of(case, config, None, x) for x in sets], 7)
            rows[-1]["chosen_ms"] = round(chosen, 5)
            tile = f"{config.rows},{config.keys},{config.warps},{config.stages}"
            best.append((times[splits], f"{tile}/{splits}={times[splits]:.4f}({chosen:.4f})"))
        del sets
        shown = "  ".join(text for _, text in sorted(best)[:4])
        sys.stdout.write(f"{case.name:30} {shown}\n")
        sys.stdout.flush()
    report = {**head("python kernels/bench/sweep.py"), "rows": rows}
    path = place(report, options.out, "sweep-")
    if path.exists():  # cases that were not swept again stay as they were
        again = {case.name for case in cases}
        old = json.loads(path.read_text("utf-8"))["rows"]
        report["rows"] = [row for row in old if row["case"] not in again] + rows
    write(report, path)
    sys.stdout.write(f"wrote {path} after {time.perf_counter() - began:.0f} s\n")
    return 0


def product_of(cases: list[Case]) -> Iterator[tuple[Case, KernelConfig]]:
    """Every (case, configuration), slowest compiles first."""
    pairs = [pair for case in cases for pair in product((case,), grid_of(case))]
    yield from sorted(pairs, key=lambda p: -p[1].rows * p[0].d)


if __name__ == "__main__":
    sys.exit(main())
