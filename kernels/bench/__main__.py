"""`python kernels/bench`: on a GPU, check the kernels, then time them against their peers.

No speed is reported while a kernel is wrong. The device's own ceilings (copy bandwidth, bf16
matrix rate) are measured first: every case has a floor, the larger of its bytes over the one and
its arithmetic over the other. Results go to ``kernels/bench/results`` with the device, the date
and the versions. Without a GPU: exit code 5. `python kernels/bench report` prints the committed
results as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from cases import SPEED, Case, bytes_of, case_calls, compile_case
from correctness import check
from peers import inputs_of, peers
from record import head, place, write
from table import (
    decode_table,
    linear_table,
    model_table,
    onnx_encoder_table,
    onnx_linear_table,
    onnx_selected_table,
    onnx_sparse_table,
    routed_table,
    sparse_table,
    table,
)
from timing import copy_gb_per_s, eager_ms, input_sets, matmul_tflops, replay_ms

EXIT_WRONG, EXIT_NO_DEVICE = 1, 5
RESULTS = Path(__file__).parent / "results"
FLEX = ("gqa prefill 4k", "gqa decode 8k, batch 8", "mla prefill 4k, 16 heads")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def time_case(case: Case, ceilings: dict[str, float]) -> dict[str, Any]:
    """Times of our op and of its peers, with the floor and what the times amount to."""
    calls = case_calls(case, input_sets(bytes_of(case)))
    ms, eager = replay_ms(calls), eager_ms(calls)
    again = replay_ms(calls)
    del calls
    floor_bytes = bytes_of(case) / ceilings["copy_gb_per_s"] / 1e6
    floor_flops = case.flops / ceilings["matmul_tflops"] / 1e9
    floor = max(floor_bytes, floor_flops)
    row: dict[str, Any] = {
        "case": case.name,
        "op": case.op,
        "shape": {k: getattr(case, k) for k in ("b", "h", "g", "n", "m", "d", "rope")},
        "ms": round(ms, 5),
        "ms_again": round(again, 5),
        "eager_ms": round(eager, 5),
        "bound": "bytes" if floor_bytes >= floor_flops else "FLOPs",
        "floor_ms": round(floor, 5),
        "fraction_of_floor": round(floor / ms, 3),
        "tflops": round(case.flops / ms / 1e9, 1),
        "gb_per_s": round(bytes_of(case) / ms / 1e6, 1),
        "peers": {},
    }
    for peer in peers(case, case.name in FLEX):
        try:
            inputs = inputs_of(peer, input_sets(bytes_of(peer.case)))
            theirs = replay_ms([peer.make(x) for x in inputs])
        except Exception as error:  # a peer that cannot do it is part of the result
            row["peers"][peer.name] = {"refused": f"{type(error).__name__}: {str(error)[:160]}"}
            continue
        finally:
            inputs = []
            torch.cuda.empty_cache()
        row["peers"][peer.name] = {
            "ms": round(theirs, 5),
            "times_faster": round(theirs / ms, 3),
            "bytes_ratio": round(bytes_of(peer.case) / bytes_of(case), 3),
            "flops_ratio": round(peer.case.flops / case.flops, 3),
        }
    say(f"{case.name:28} {ms:8.4f} ms  {floor / ms:5.0%} of floor  {row['peers']}")
    return row


def measure(checks: list[dict[str, Any]], only: str) -> dict[str, Any]:
    """The whole report."""
    cases = [case for case in SPEED if only in case.name]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_case, cases))
    ceilings = {"copy_gb_per_s": copy_gb_per_s(), "matmul_tflops": matmul_tflops()}
    say(f"ceilings: {ceilings}")
    return {
        **head("python kernels/bench"),
        "dtype": "bfloat16",
        "ceilings": {k: round(v, 1) for k, v in ceilings.items()},
        "checks": checks,
        "speed": [time_case(case, ceilings) for case in cases],
    }


def main() -> int:
    """Check, time, write, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--device", default="nvidia-h200", help="whose results to report")
    parser.add_argument("--check-only", action="store_true", help="do not time")
    parser.add_argument("--no-check", action="store_true", help="time only; nothing is written")
    parser.add_argument("--only", default="", help="cases named so; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.what == "report":
        made = {
            options.device: table,
            f"model-{options.device}": model_table,
            "onnx_decode": decode_table,
            "sparse_cpu": sparse_table,
            "onnx_sparse": onnx_sparse_table,
            "onnx_encoder": onnx_encoder_table,
            "onnx_selected": onnx_selected_table,
            "routed_cpu": routed_table,
            "linear_cpu": linear_table,
            "onnx_linear": onnx_linear_table,
        }
        for name, shown in made.items():
            say(shown(json.loads((RESULTS / f"{name}.json").read_text("utf-8"))) + "\n")
        return 0
    if not torch.cuda.is_available():
        sys.stderr.write(
            "no GPU: this benchmark runs the Triton kernels on a CUDA or ROCm device and there is"
            " none here\n  next: run it on a machine with a GPU; on this one, `python"
            " kernels/bench/aot.py` compiles every kernel for every target\n"
        )
        return EXIT_NO_DEVICE
    checks = [] if options.no_check else check()
    wrong = [row for row in checks if not row["ok"]]
    if wrong:
        sys.stderr.write(f"{len(wrong)} checks failed, no speed is reported: {wrong}\n")
        return EXIT_WRONG
    if options.check_only:
        say(f"{len(checks)} checks passed")
        return 0
    report = measure(checks, options.only)
    if checks and not options.only:  # a part would replace the whole
        path = place(report, options.out)
        write(report, path)
        say(f"wrote {path}")
    say(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
