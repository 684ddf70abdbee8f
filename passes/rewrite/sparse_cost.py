"""What sparse heads cost: rows kept and read at the context of the original's cost."""

from __future__ import annotations

from collections.abc import Sequence

from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseConfig
from reattend.mixers.sparse_config import SparseConfig
from reattend.passes.rewrite.base import Cost, dense_cost
from reattend.patterns.pattern import HeadPattern


def settled(config: DenseConfig, made: SparseConfig) -> Cost:
    """Where every head's pattern is known."""
    before, core = dense_cost(config), config.core
    each, length = core.qk_head_dim + core.v_head_dim, before.context
    group = core.heads // core.kv_heads
    kept = read = 0.0
    for c in made.classes:
        # what is not causal decodes nothing
        seen, select = read_at(c.pattern, length, core, decode=core.causal), c.pattern.select
        chosen = select.work(length, core) if select is not None else 0.0
        read += len(c.kv_heads) * group * (each * seen + chosen)
        rows = seen if made.evict and c.pattern.monotone else length
        kept += len(c.kv_heads) * (each * rows + beside(c.pattern, core, length))
    flops = before.flops_per_token - _attention(before, core) + 2 * round(read)
    own = 0
    for c in made.classes:
        if c.pattern.select is not None:
            n = len(c.kv_heads)
            mine = core.model_copy(update={"heads": n * group, "kv_heads": n})
            own += n * c.pattern.select.parameters(mine)
    return Cost(-(-round(kept) // length), before.parameters + own, flops, length)


def searched(config: DenseConfig, candidates: Sequence[HeadPattern], share: float) -> Cost:
    """Where heads are to be chosen, what they sum to; selectors may keep and read all."""
    before = dense_cost(config)
    if any(p.select is not None for p in candidates):
        return before
    nothing = Cost(0, 0, before.flops_per_token - _attention(before, config.core), before.context)
    return between(before, nothing, share)


def between(whole: Cost, part: Cost, share: float) -> Cost:
    """This share of the heads costs what `whole` does, the others what `part` does."""
    cache = round(share * whole.cache + (1 - share) * part.cache)
    flops = round(share * whole.flops_per_token + (1 - share) * part.flops_per_token)
    return Cost(cache, whole.parameters, flops, whole.context)


def read_at(pattern: HeadPattern, length: int, core: CoreConfig, *, decode: bool) -> int:
    """Keys that the last of `length` tokens reads, at most, in prefill or while decoding."""
    dense = "prefill" if decode else "decode"
    if pattern.select is not None and pattern.select.acts == dense:
        return HeadPattern(full=True).reads(length, core)
    return pattern.reads(length, core)


def beside(pattern: HeadPattern, core: CoreConfig, length: int) -> float:
    """Numbers per KV head that a cache of so many tokens holds for the selector."""
    select = pattern.select
    return 0.0 if select is None else select.stored(core) * length + select.held(core)


def _attention(cost: Cost, core: CoreConfig) -> int:
    """FLOPs of one token's scores and sums against every cached key."""
    return 2 * core.heads * (core.qk_head_dim + core.v_head_dim) * cost.context
