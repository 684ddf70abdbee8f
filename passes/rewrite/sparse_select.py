"""What selectors mean for `to: sparse`: refusals, calibration, and what a report states of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.mixers.base import Context
from reattend.mixers.dense import DenseConfig
from reattend.mixers.selecting.channels import ChannelsMethod
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import SparseConfig
from reattend.parts import query_heads
from reattend.passes.base import Refusal
from reattend.passes.rewrite.sparse_cost import beside, read_at
from reattend.patterns.learned import LowRank
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import Recorded
from reattend.statistics import TEXT_TOKENS


def misfit(config: DenseConfig, patterns: list[HeadPattern]) -> Refusal | None:
    """Why a block cannot have one of these patterns, for the sake of its selector."""
    core = config.core
    for pattern in patterns:
        if isinstance(pattern.select, Recorded) and len(patterns) > 1:
            return Refusal("select: recorded is for all heads of a block: give no other pattern")
        if pattern.select is not None and pattern.select.calibrated and _reads_more(config):
            return Refusal(
                f"select: {pattern.select.kind} is calibrated on the block's input alone, and its "
                "queries or keys read more"
            )
        if isinstance(pattern.select, LowRank) and pattern.select.tokens > TEXT_TOKENS:
            return Refusal(
                f"select: low-rank learns from rows of {TEXT_TOKENS} tokens at most, and an image "
                f"with its text has {pattern.select.tokens}"
            )
        reason = pattern.select.misfit(core) if pattern.select is not None else None
        if reason is not None:
            return Refusal(reason)
    return None


def _reads_more(config: DenseConfig) -> bool:
    return any(s.opaque is not None and s.opaque.extras for s in (config.q, config.k))


def at_layer(pattern: HeadPattern, layer: int) -> HeadPattern:
    """A pattern whose selector is told which layer of a stack it is for, if it asks."""
    if pattern.select is None:
        return pattern
    return pattern.model_copy(update={"select": pattern.select.at_layer(layer)})


@torch.no_grad()
def calibrate(mixer: SparseAttention, samples: list[Tensor] | None) -> None:
    """Choose the channels of labels from rows of the block's input [n, D], where there are some."""
    for number, c in enumerate(mixer.config.classes):
        method = mixer.selecting[str(number)] if c.pattern.select is not None else None
        if not isinstance(method, ChannelsMethod) or not samples:
            continue
        like = next(mixer.parameters())
        rows = [x[None].to(like) for x in samples]
        made = [mixer.project(x, x, Context(), None) for x in rows]
        heads = query_heads(mixer.config.core, c.kv_heads)
        queries = torch.cat([q[:, heads] for q, _ in made], 2)
        method.calibrate(queries, torch.cat([new.keys[:, list(c.kv_heads)] for _, new in made], 2))


def stated(config: SparseConfig, at: int) -> dict[str, Any]:
    """For the report: the three densities at so many tokens; of selectors, when and from what.

    Nothing where every head sees every key. The share of keys read is counted in the block's causal
    attention, over all heads.
    """
    if all(c.pattern.full for c in config.classes):
        return {}
    core, causal = config.core, config.core.model_copy(update={"pattern": "causal"})
    read = causal if core.causal else core
    heads = [(len(c.kv_heads) / core.kv_heads, c.pattern) for c in config.classes]

    def density(decode: bool) -> str:
        share = sum(n * read_at(p, at, read, decode=decode) for n, p in heads) / at
        return f"{share:.3f}"

    found = [p.select for _, p in heads if p.select is not None]
    told: dict[str, Any] = {
        "density_at": at,
        "attention_density": density(True),
        "kv_density": f"{kv_density(config, at):.3f}",
        "dense_heads": f"{sum(n for n, p in heads if p.full):.3f}",
    }
    if found:
        told["select"] = ", ".join(dict.fromkeys(f"{s.kind} ({s.acts})" for s in found))
        told["attention_density"] = f"{density(False)}, at most"
        if core.causal:
            told["attention_density"] = (
                f"{density(False)} in prefill, {density(True)} in decoding, at most"
            )
    per_call = [s.kind for s in found if s.depends_on_calls]
    if per_call and core.causal:
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
        held += len(c.kv_heads) * (kept * each + beside(c.pattern, core, at))
    return held / (at * core.kv_heads * each)


def heads_seen(config: SparseConfig) -> dict[str, Any]:
    """What the report shows: which heads see what."""
    full = [h for c in config.classes if c.pattern.full for h in c.kv_heads]
    words = list(dict.fromkeys(c.pattern.words() for c in config.classes if not c.pattern.full))
    found: dict[str, Any] = {"heads_full": ", ".join(map(str, sorted(full))) or "none"}
    return {**found, "pattern": "; ".join(words)} if words else found
