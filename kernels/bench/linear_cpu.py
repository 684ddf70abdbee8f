"""Milliseconds of `reattend::linear_attention` on a CPU beside torch's softmax attention.

    python kernels/bench/linear_cpu.py --out kernels/bench/results/linear_cpu.json

One thread, float32, batch 1. ``elu+1``: features of 64 numbers and a denominator, the maps
themselves included; ``lolcats``: as the mixer computes that preset, maps of 128 features per query
head, a softmax over terraces of 64 keys and the sums over older ones; ``gated``: sums with a decay
for each of 64 features of a KV head, features are softmaxes; ``liger``: that preset, the same and
a softmax over the last 64 keys. SDPA gets queries, keys and values of the same widths. Ways take
turns in one process; figures are medians of processor time: on a shared machine wall time is not
steady. The first tokens are compared with the formula before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cpu_run import main
from table import linear_table
from timing import in_turns
from torch import Tensor

from reattend.kernels.linear_attention import linear_attention, reference
from reattend.kernels.linear_attention.reference import divided, with_ones
from reattend.mixers.features import FeatureMap
from reattend.mixers.linear_window import band

COMMAND = "python kernels/bench/linear_cpu.py --out kernels/bench/results/linear_cpu.json"
WIDTH, WINDOW, MIX = 64, 64, 0.1
SCALE = WIDTH**-0.5
#: tokens that are compared with the formula
COMPARED = 200


@dataclass(frozen=True)
class Case:
    """N queries at the end of M tokens, H heads in G groups."""

    name: str
    n: int
    m: int
    h: int = 8
    g: int = 8


CASES = (
    *(Case(f"prefill {m}", m, m) for m in (256, 512, 1024, 2048, 4096, 8192)),
    Case("prefill 2048, 2 KV heads", 2048, 2048, g=2),
    *(Case(f"decode {m}", 1, m) for m in (512, 2048, 8192)),
)
Op = Callable[..., tuple[Tensor, Tensor]]


def ways(case: Case) -> dict[str, Callable[[int, Op], Tensor]]:
    """Each way of linear attention, for the first so many tokens, by an op of this meaning."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, case.h, case.m, WIDTH, generator=gen)
    k, v = (torch.randn(1, case.g, case.m, WIDTH, generator=gen) for _ in range(2))
    maps = [FeatureMap("hedgehog", case.h, WIDTH, WIDTH) for _ in range(2)]
    for each in maps:
        each.start(identity=True)
    repeat = case.h // case.g

    def elu(n: int, op: Op) -> Tensor:
        features = (F.elu(x[:, :, :n]) + 1 for x in (q, k))
        return op(*features, v[:, :, :n], None, None, 0, 1, True)[0]

    def lolcats(n: int, op: Op) -> Tensor:
        near = band(q[:, :, :n], k[:, :, :n], with_ones(v[:, :, :n]), SCALE, WINDOW, "terraced")
        keys, values = (x[:, :, :n].repeat_interleave(repeat, 1) for x in (k, v))
        older = op(
            maps[0](q[:, :, :n]), maps[1](keys), with_ones(values), None, None, WINDOW + 1, WINDOW
        )  # fmt: skip
        return divided(near * MIX + older[0])

    def gated(n: int, op: Op) -> Tensor:
        k_n = k[:, :, :n]
        features = (x.softmax(-1) for x in (q[:, :, :n], k_n))
        return op(*features, v[:, :, :n], F.logsigmoid(k_n) / 16, None, 0, 1, False)[0]

    def liger(n: int, op: Op) -> Tensor:
        near = band(q[:, :, :n], k[:, :, :n], with_ones(v[:, :, :n]), SCALE, WINDOW, "sliding")
        return 0.5 * divided(near) + 0.5 * gated(n, op)

    def softmax(n: int, _: Op) -> Tensor:
        whole = case.n == case.m
        given = q if whole else q[:, :, -1:]
        return F.scaled_dot_product_attention(
            given, k, v, is_causal=whole, scale=SCALE, enable_gqa=case.h != case.g
        )

    if case.n == case.m:
        return {"sdpa": softmax, "elu+1": elu, "lolcats": lolcats, "gated": gated, "liger": liger}
    features = F.elu(torch.randn(1, case.h, 1, WIDTH, generator=gen)) + 1
    state = torch.rand(1, case.g, WIDTH, WIDTH + 1, generator=gen)

    def step(n: int, op: Op) -> Tensor:
        return op(features, features[:, : case.g], v[:, :, -1:], None, state, 0, 1, True)[0]

    def gated_step(n: int, op: Op) -> Tensor:
        decay = -features[:, : case.g] / 16
        given = features[:, : case.g], v[:, :, -1:], decay, state[..., 1:] / WIDTH
        return op(features, *given, 0, 1, False)[0]

    return {"sdpa": softmax, "elu+1": step, "gated": gated_step}


def run(case: Case, rounds: int) -> dict[str, Any]:
    made = ways(case)
    for name, way in made.items():
        count = min(case.m, COMPARED)
        want = way(count, reference.linear_attention)
        error = (way(count, linear_attention) - want).abs().max() / want.abs().max().clamp_min(1)
        if not float(error) < 1e-4:
            raise RuntimeError(f"{case.name}, {name}: another result than the formula's")
    calls = {name: (lambda way=way: way(case.m, linear_attention)) for name, way in made.items()}
    found = in_turns(calls, rounds)
    ratios = {
        name: round(found["sdpa"]["cpu_ms"] / row["cpu_ms"], 2)
        for name, row in found.items()
        if name != "sdpa"
    }
    sys.stdout.write(f"{case.name}: SDPA {found['sdpa']['cpu_ms']} ms, {ratios}\n")
    shape = {"n": case.n, "m": case.m, "h": case.h, "g": case.g, "d": WIDTH}
    return {"case": case.name, "shape": shape, "ms": found, "times_faster": ratios}


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, linear_table, 7)
