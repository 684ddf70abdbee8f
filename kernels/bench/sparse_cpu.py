"""Milliseconds of `reattend::sparse_attention` on a CPU against torch's own ways to the same mask.

    python kernels/bench/sparse_cpu.py --out kernels/bench/results/sparse_cpu.json

One thread, float32, batch 1, head width 64. Every way runs in the same process, in turns; figures
are medians, of processor time and of wall time: on a shared machine only the first is steady.
Outputs are compared before anything is timed.

Ways:
    ours         the op, its layout compiled before
    sdpa-mask    F.scaled_dot_product_attention with the same boolean mask
    sdpa-causal  the same without a mask (is_causal): what dense attention costs
    flex         FlexAttention compiled, with the block mask of the same predicate (prefill only)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cpu_run import main
from table import sparse_table
from timing import in_turns, times_faster
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from reattend.kernels.sparse_attention import BlockLayout, sparse_attention

COMMAND = "python kernels/bench/sparse_cpu.py --out kernels/bench/results/sparse_cpu.json"
WIDTH, SCALE, BLOCK = 64, 64**-0.5, 64


@dataclass(frozen=True)
class Case:
    """N queries at the end of M tokens; each pair (sinks, window) is the pattern of some heads."""

    name: str
    n: int
    m: int
    h: int
    g: int
    classes: tuple[tuple[int, int], ...]
    flex: bool = False


A_SHAPE = ((4, 256),)
HALF = ((0, 1 << 30), (4, 256))  # half of the heads dense, half sinks and window
CASES = (
    Case("prefill 1k", 1024, 1024, 8, 8, A_SHAPE),
    Case("prefill 4k", 4096, 4096, 8, 8, A_SHAPE, flex=True),
    Case("prefill 4k, 2 KV heads", 4096, 4096, 8, 2, A_SHAPE, flex=True),
    Case("prefill 4k, half of the heads dense", 4096, 4096, 8, 8, HALF),
    Case("512 new on 4k", 512, 4096, 8, 8, A_SHAPE),
    Case("decode 4k", 1, 4096, 8, 8, A_SHAPE),
    Case("decode 16k", 1, 16384, 8, 8, A_SHAPE),
)
Call = Callable[[], Tensor]


def seen(pair: tuple[int, int], i: Any, j: Any) -> Any:
    """Whether query i sees key j."""
    sinks, window = pair
    return (j <= i) & ((i - j < window) | (j < sinks))


def ways(case: Case) -> tuple[dict[str, Call], float]:
    """Each way as a call without arguments, and the density of the layout."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(1, case.h, case.n, WIDTH, generator=gen)
    k, v = (torch.randn(1, case.g, case.m, WIDTH, generator=gen) for _ in range(2))
    head_layout = torch.arange(case.h) * len(case.classes) // case.h
    first = (case.m - case.n) // BLOCK
    i, j = torch.arange(first * BLOCK, case.m)[:, None], torch.arange(case.m)
    mask = torch.stack([seen(pair, i, j) for pair in case.classes])
    layout = BlockLayout.from_mask(mask, head_layout, BLOCK, first=first)
    mask_BHNM = mask[head_layout, -case.n :][None]
    if len(case.classes) == 1:
        mask_BHNM = mask_BHNM[:, :1]
    rows = (torch.zeros(1, dtype=torch.int64), torch.tensor([case.m]))
    gqa = case.h != case.g

    def ours() -> Tensor:
        y: Tensor = sparse_attention(q, k, v, *layout.tensors, *rows, BLOCK, first, SCALE)[0]
        return y

    def sdpa_mask() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask_BHNM, scale=SCALE, enable_gqa=gqa)

    def sdpa_causal() -> Tensor:  # its is_causal is about whole sequences; one query sees all
        whole = case.n == case.m
        return F.scaled_dot_product_attention(q, k, v, is_causal=whole, scale=SCALE, enable_gqa=gqa)

    made: dict[str, Call] = {"ours": ours, "sdpa-mask": sdpa_mask}
    if case.n in (1, case.m):
        made["sdpa-causal"] = sdpa_causal
    if case.flex:
        compiled = torch.compile(flex_attention)
        blocks = create_block_mask(
            lambda b, h, i, j: seen(case.classes[0], i, j), None, None, case.n, case.m, device="cpu"
        )
        made["flex"] = lambda: compiled(q, k, v, block_mask=blocks, scale=SCALE, enable_gqa=gqa)
    density = layout.density() if case.n == 1 else layout.density(case.n, case.m)
    return made, density


def run(case: Case, rounds: int) -> dict[str, Any]:
    calls, density = ways(case)
    want = calls["sdpa-mask"]()
    different = {
        name: float((call() - want).abs().max())
        for name, call in calls.items()
        if name in ("ours", "flex")
    }
    wrong = {name: error for name, error in different.items() if not error < 1e-5}
    if wrong:
        raise RuntimeError(f"{case.name}: another result than SDPA's: {wrong}")
    found = in_turns(calls, rounds)
    ours, ratio = found["ours"]["cpu_ms"], times_faster(found)
    sys.stdout.write(f"{case.name}: {ours:.2f} ms, {ratio}\n")
    shape = {"n": case.n, "m": case.m, "h": case.h, "g": case.g, "d": WIDTH, "block": BLOCK}
    return {
        "case": case.name,
        "shape": shape,
        "density": round(density, 4),
        "ms": found,
        "times_faster": ratio,
        "difference": different,
    }


if __name__ == "__main__":
    main(__doc__, COMMAND, CASES, run, sparse_table, 7)
