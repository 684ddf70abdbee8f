"""Block layouts of the benchmark's sparse problems, and what of them a call reads."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from cases import Case

from reattend.kernels.sparse_attention import BlockLayout

if TYPE_CHECKING:
    from reattend.patterns.pattern import HeadPattern

BLOCK = 64


class Read(NamedTuple):
    """What a call with a layout computes and reads.

    Attributes:
        pairs: visible (query, key) pairs, all heads of one row of the batch together.
        density: blocks read over the blocks that causal attention reads.
        rows: rows of keys that some query reads, all KV heads together.
    """

    pairs: int
    density: float
    rows: int


def heads_of(case: Case) -> list[HeadPattern]:
    """The patterns of a case whose heads are described by terms, one layout each."""
    # plans need packages that a machine for measuring may not have; nothing else here does
    from reattend.patterns.pattern import HeadPattern
    from reattend.patterns.terms import Stride

    if case.pattern == "sinks and window of 1k":  # the preset a-shape
        return [HeadPattern(sinks=4, window=1020)]
    if case.pattern.startswith("s2"):  # a band, and every eighth block (preset s2) or 64th
        period = int(case.pattern.rpartition(" ")[2]) if " " in case.pattern else 8
        strides = [Stride(period=period, offset=i * period // 8, block=BLOCK) for i in range(8)]
        return [HeadPattern(window=1024, stride=stride) for stride in strides]
    raise ValueError(f"no pattern is called {case.pattern!r}")


@lru_cache(maxsize=4)
def layout_of(case: Case) -> BlockLayout:
    """The layout on the CPU; of a decode, of its last queries only."""
    first, blocks = (case.m - case.n) // BLOCK, -(-case.m // BLOCK)
    if case.pattern.endswith("% of blocks"):
        share = float(case.pattern.partition(" ")[0]) / 100
        return some_blocks(share, first, blocks, case)
    from reattend.mixers.config import CoreConfig
    from reattend.patterns.layouts import block_layout

    patterns = heads_of(case)
    core = CoreConfig(
        heads=case.h, kv_heads=case.g, qk_head_dim=case.d, v_head_dim=case.d, scale=1.0,
        pattern="causal",
    )  # fmt: skip
    each = case.h // len(patterns)
    chosen = [head // each for head in range(case.h)]
    return block_layout(patterns, chosen, core, case.m, start=case.m - case.n)


def some_blocks(share: float, first: int, blocks: int, case: Case) -> BlockLayout:
    """Random blocks of every KV group, and each query block's own; nothing but it has a tile."""
    make = torch.Generator().manual_seed(0)
    row = torch.arange(first, blocks)
    kept = torch.rand(case.g, blocks - first, blocks, generator=make) < share
    kept &= torch.arange(blocks) < row[:, None]
    kept[:, row - first, row] = True
    place = kept.nonzero()
    counts = kept.sum(-1).flatten().cumsum(0).view(case.g, -1)
    begins = torch.cat([counts.new_zeros(1), counts[:-1, -1]])[:, None]
    own = place[:, 2] == place[:, 1] + first
    bits = (torch.ones(BLOCK, dtype=torch.int64) << torch.arange(BLOCK)).cumsum(0)[None]
    return BlockLayout(
        BLOCK, first, torch.cat([begins, counts], 1).int(), place[:, 2].int(),
        torch.where(own, 0, -1).int(), bits,
        (torch.arange(case.h) // (case.h // case.g)).int(),
    )  # fmt: skip


@lru_cache(maxsize=256)
def read_by(case: Case) -> Read:
    """Counted from the layout."""
    layout = layout_of(case)
    first = layout.first
    blocks = layout.row_ptr.shape[1] - 1
    entries = layout.row_ptr[:, -1] - layout.row_ptr[:, 0]
    heads = layout.head_layout.long()
    causal = sum(first + i + 1 for i in range(blocks))
    density = float(entries[heads].double().mean()) / causal
    if case.decodes:  # the row of the last query
        each, own, pairs = case.h // case.g, [], 0
        for number in range(layout.row_ptr.shape[0]):
            begin, stop = layout.row_ptr[number, -2:].tolist()
            own.append(set(layout.col[begin:stop].tolist()))
        for head in heads.tolist():
            pairs += len(own[head])
        groups = [heads[i : i + each].tolist() for i in range(0, case.h, each)]
        rows = sum(len(set().union(*(own[number] for number in group))) for group in groups)
        return Read(pairs * BLOCK, density, min(rows * BLOCK, case.g * case.m))
    pairs = int(layout.pairs()[heads].sum())
    return Read(pairs, density, case.g * case.m)
