"""`python kernels/bench`: on a GPU, check the kernels, then time them against torch's SDPA.

No speed is reported while a kernel is wrong. Results go to ``kernels/bench/results`` with the
device, the date and the versions. Without a GPU: exit code 5.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from cases import CORRECT, OPTIONS, SPEED, Case, error_of, ours, tensors, torchs

EXIT_WRONG, EXIT_NO_DEVICE = 1, 5
RESULTS = Path(__file__).parent / "results"


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def check(device: str, cases: tuple[Case, ...] = CORRECT) -> list[dict[str, Any]]:
    """Every case in every dtype with every option set; error in units of the allowed one."""
    rows = []
    for case in cases:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for options in OPTIONS:
                error = error_of(case, dtype, device, options)
                name = f"{case.name}, {str(dtype)[6:]}, {options or 'causal'}"
                rows.append({"name": name, "error": round(error, 4), "ok": error <= 1.0})
                say(f"{'ok   ' if error <= 1 else 'WRONG'} {error:8.3f}  {name}")
    return rows


def time_case(case: Case, device: str, milliseconds: Any) -> dict[str, Any]:
    """Median milliseconds of our kernel and of SDPA, with the rates they amount to."""
    inputs = tensors(case, torch.bfloat16, device)
    rows = (
        torch.zeros(case.b, dtype=torch.int64, device=device),
        torch.full((case.b,), case.m, dtype=torch.int64, device=device),
    )
    scale = (case.d + case.rope) ** -0.5
    mine = milliseconds(ours(case, inputs, rows, scale))
    theirs = milliseconds(torchs(case, inputs, scale))
    row = {
        "case": case.name,
        "ours_ms": round(mine, 4),
        "sdpa_ms": round(theirs, 4),
        "times_faster": round(theirs / mine, 2),
        "ours_tflops": round(case.flops / mine / 1e9, 1),
        "ours_cache_gb_per_s": round(case.cache_bytes / mine / 1e6, 1),
    }
    say(f"{case.name:28} ours {mine:8.4f} ms   sdpa {theirs:8.4f} ms   x{theirs / mine:.2f}")
    return row


def main() -> int:
    """Check, time, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check-only", action="store_true", help="do not time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write(
            "no GPU: this benchmark runs the Triton kernels on a CUDA or ROCm device and there is"
            " none here\n  next: run it on a machine with a GPU; on this one, `python"
            " kernels/bench/aot.py` compiles every kernel for every target\n"
        )
        return EXIT_NO_DEVICE
    import triton
    from triton.testing import do_bench

    checks = check("cuda")
    wrong = [row["name"] for row in checks if not row["ok"]]
    if wrong:
        sys.stderr.write(f"{len(wrong)} checks failed, no speed is reported: {wrong}\n")
        return EXIT_WRONG
    name = torch.cuda.get_device_name()
    report = {
        "command": "python kernels/bench",
        "date": date.today().isoformat(),
        "device": name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "dtype": "bfloat16",
        "checks": checks,
        "speed": []
        if options.check_only
        else [
            time_case(case, "cuda", lambda call: float(do_bench(call, return_mode="median")))
            for case in SPEED
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
