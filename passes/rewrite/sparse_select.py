"""What selectors mean for `to: sparse`: refusals, cost, and the densities that a report states."""

from __future__ import annotations

from typing import Any

from reattend.mixers.config import CoreConfig
from reattend.mixers.sparse_config import SparseConfig
from reattend.passes.base import Refusal
from reattend.patterns.pattern import HeadPattern


def misfit(core: CoreConfig, patterns: list[HeadPattern]) -> Refusal | None:
    """Why a block cannot have one of these patterns, for the sake of its selector."""
    for pattern in patterns:
        reason = pattern.select.misfit(core) if pattern.select is not None else None
        if reason is not None:
            return Refusal(reason)
    return None


def read_at(pattern: HeadPattern, length: int, core: CoreConfig, *, decode: bool) -> int:
    """Keys that the last of `length` tokens reads, at most, in prefill or while decoding."""
    dense = "prefill" if decode else "decode"
    if pattern.select is not None and pattern.select.acts == dense:
        return HeadPattern(full=True).reads(length, core)
    return pattern.reads(length, core)


def beside(pattern: HeadPattern, core: CoreConfig) -> float:
    """Numbers per token and KV head that a cache holds for the selector."""
    return pattern.select.stored(core) if pattern.select is not None else 0.0


def choosing(pattern: HeadPattern, length: int, core: CoreConfig) -> float:
    """Multiply-adds per query head to choose for one new token of `length`."""
    return pattern.select.work(length, core) if pattern.select is not None else 0.0


def stated(config: SparseConfig, at: int) -> dict[str, Any]:
    """For the report, where something is selected: when, from what, and the three densities."""
    found = [c.pattern.select for c in config.classes if c.pattern.select is not None]
    if not found:
        return {}
    core, causal = config.core, config.core.model_copy(update={"pattern": "causal"})
    read = causal if core.causal else core
    heads = [(len(c.kv_heads) / core.kv_heads, c.pattern) for c in config.classes]

    def density(decode: bool) -> str:
        share = sum(n * read_at(p, at, read, decode=decode) for n, p in heads) / at
        return f"{share:.3f}"

    per_call = [s.kind for s in found if s.depends_on_calls]
    told: dict[str, Any] = {
        "select": ", ".join(dict.fromkeys(f"{s.kind} ({s.acts})" for s in found)),
        "density_at": at,
        "attention_density": f"{density(False)} in prefill, {density(True)} in decoding, at most",
        "kv_density": f"{kv_density(config, at):.3f}",
        "dense_heads": f"{sum(n for n, p in heads if p.full):.3f}",
    }
    if per_call:
        told["depends on how a text is cut into calls"] = ", ".join(dict.fromkeys(per_call))
    return told


def kv_density(config: SparseConfig, at: int) -> float:
    """Numbers that a cache of `at` tokens holds, of the original's."""
    core = config.core
    each, held = core.qk_head_dim + core.v_head_dim, 0.0
    for c in config.classes:
        kept = at
        if config.evict and c.pattern.monotone:
            kept = c.pattern.reads(at, core)
        held += len(c.kv_heads) * (kept * each + at * beside(c.pattern, core))
    return held / (at * core.kv_heads * each)
