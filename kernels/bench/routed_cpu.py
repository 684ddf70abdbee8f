"""Milliseconds of `reattend::routed_attention` on a CPU beside torch's attention of all heads.

    python kernels/bench/routed_cpu.py --out kernels/bench/results/routed_cpu.json

One thread, float32, batch 1. Each query uses the same number of KV groups (or heads), drawn at
random. Ways take turns in one process; figures are medians of processor time: on a shared machine
wall time is not steady. Outputs are compared before anything is timed. FLOPs are what torch's
FlopCounterMode counts, of dense attention in its matrix products; it knows no causality. Bytes of
keys and values read in decode are those of the groups that the query uses, counted from its choice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cpu_run import main
from table import routed_table
from timing import in_turns
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reattend.kernels.routed_attention import routed_attention

COMMAND = "python kernels/bench/routed_cpu.py --out kernels/bench/results/routed_cpu.json"
SHARES = (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class Case:
    """N queries at the end of M tokens, H heads in G groups of width d, `units` of them chosen."""

    name: str
    n: int
    m: int
    h: int
    g: int
    d: int
    units: int


CASES = (
    Case("prefill 1k, 8 groups of 4", 1024, 1024, 32, 8, 128, 8),
    Case("prefill 1k, 8 groups of 4, by head", 1024, 1024, 32, 8, 128, 32),
    Case("prefill 2k, 8 heads", 2048, 2048, 8, 8, 64, 8),
    Case("decode 1k, 8 groups of 4", 1, 1024, 32, 8, 128, 8),
    Case("decode 4k, 8 groups of 4", 1, 4096, 32, 8, 128, 8),
    Case("decode 16k, 8 groups of 4", 1, 16384, 32, 8, 128, 8),
)


def routed(*tensors: Tensor, scale: float) -> Tensor:
    """The op without its log-sum-exp."""
    y: Tensor = routed_attention(*tensors, scale=scale)[0]
    return y


def flops(call: Any) -> int:
    """What FlopCounterMode counts of a call; it has no formula for torch's fused CPU kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def run(case: Case, rounds: int) -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, case.h, case.n, case.d, generator=gen)
    k, v = (torch.randn(1, case.g, case.m, case.d, generator=gen) for _ in range(2))
    rows, scale = (torch.zeros(1).long(), torch.tensor([case.m])), case.d**-0.5

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=case.n == case.m, scale=scale, enable_gqa=case.h != case.g
        )

    calls, used = {"dense": dense}, {}
    for share in SHARES:
        rank = torch.rand(1, case.units, case.n, generator=gen).argsort(1)
        active = rank < round(share * case.units)
        used[f"{share:.0%}"] = active
        calls[f"{share:.0%}"] = partial(routed, q, k, v, active, *rows, scale=scale)
    whole = dense()
    for name, active in used.items():
        each = active.repeat_interleave(case.h // case.units, 1)[..., None]
        if not float((calls[name]() - whole * each).abs().max()) < 1e-5:
            raise RuntimeError(f"{case.name}, {name}: another result than SDPA's")
    found, counted = in_turns(calls, rounds), {name: flops(call) for name, call in calls.items()}
    row_bytes = 4 * 2 * case.d * case.m
    whole_bytes = row_bytes * case.g
    read = {n: row_bytes * int(a.view(case.g, -1).any(-1).sum()) for n, a in used.items()}
    told = {
        name: {
            **found[name],
            "times_faster": round(found["dense"]["cpu_ms"] / found[name]["cpu_ms"], 2),
            "flops": round(counted[name] / counted["dense"], 4),
            "kv_bytes": read[name] / whole_bytes if case.n == 1 else None,
        }
        for name in used
    }
    words = ", ".join(f"{name} x{row['times_faster']}" for name, row in told.items())
    sys.stdout.write(f"{case.name}: dense {found['dense']['cpu_ms']} ms; {words}\n")
    return {"case": case.name, "shape": vars(case), "dense": found["dense"], "routed": told}


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, routed_table, 9)
