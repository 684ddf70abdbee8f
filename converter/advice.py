"""What fixed MLA shapes keep of a model's cache, before anything is converted.

Kernels of servers are built for few shapes; for models with few key/value heads these are larger
than the cache they replace. Layout letters: G key/value groups, d, e key and value widths, r latent
rank, R rotary width.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from reattend.errors import RefusedError
from reattend.finder import FoundAttention
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_sizes import full_rank, resolve
from reattend.passes.rewrite.registry import conversion
from reattend.plan import Plan
from reattend.preflight import choose

#: shipped plans that give all layers one shape
SHAPES = ("deepseek", "mla-512-64", "mla-256-64")


@dataclass(frozen=True)
class Fit:
    """One plan on all blocks of one size.

    Attributes:
        plan: its name.
        blocks: how many blocks have this size.
        arithmetic: r + R against G x (d + e), as text.
        share: of the original cache.
        takes: whether the conversion accepts it as it is.
        advice: what that means, or what would have to change.
    """

    plan: str
    blocks: int
    arithmetic: str
    share: float
    takes: bool
    advice: str


def advise(found: FoundAttention) -> list[Fit]:
    """Every shape on every kind of block of a model."""
    fits = []
    for name in SHAPES:
        plan = Plan.load(name)
        choices = choose(found, plan)
        kinds = Counter(c.config for c in choices)
        reasons = {c.config: c.reason for c in choices if c.action == "refused"}
        for config, blocks in kinds.items():
            if not config.cache_per_token:  # it reads what another block caches
                continue
            options: Any = plan.rules[0].options
            fits.append(_fit(name, blocks, config, options, reasons.get(config, "")))
    return fits


def loading(model: Any, found: FoundAttention) -> str:
    """Why transformers' DeepSeek classes could not carry the model, or nothing."""
    from reattend.targets.deepseek import foresee

    plan = Plan.load("deepseek")
    try:
        foresee(model, choose(found, plan), "v3")
    except RefusedError as refusal:
        return "; ".join(line.strip() for line in refusal.where.splitlines() if line.strip())
    return ""


def _sizes(config: Any, options: MlaOptions) -> tuple[int, int]:
    """r and R as the plan gives them, whether or not they fit; else as they resolve."""
    rank, rope = options.kv_lora_rank, options.qk_rope_head_dim
    if isinstance(rank, int) and isinstance(rope, int):
        return rank, rope
    sizes = resolve(config, options)
    return (0, 0) if isinstance(sizes, Refusal) else (sizes.kv_lora_rank, sizes.qk_rope_head_dim)


def _fit(name: str, blocks: int, config: Any, options: MlaOptions, reason: str) -> Fit:
    core, before = config.core, config.cache_per_token
    wants = options.model_copy(update={"allow_growth": True})
    rank, rope = _sizes(config, wants)
    share = (rank + rope) / before
    arithmetic = (
        f"{rank} + {rope} = {rank + rope} of {core.kv_heads} x ({core.qk_head_dim} + "
        f"{core.v_head_dim}) = {before}"
    )
    if not reason:
        return Fit(name, blocks, arithmetic, share, True, f"saves {100 * (1 - share):.0f} %")
    if share < 1:
        return Fit(name, blocks, arithmetic, share, False, reason)
    most = full_rank(config, wants, rope)
    advice = "grows the cache: allow_growth: true, if a kernel needs this shape"
    if rank > most:
        advice = (
            f"grows the cache: r = {most} already holds all of it; convert with "
            f"kv_lora_rank: {max(most, 1)} or less and export with --pad {rank}+{rope}"
        )
    allowed = conversion("mla")().check(config, wants)
    if rank <= most and allowed is not None:
        advice = f"grows the cache, and {allowed.reason}"
    return Fit(name, blocks, arithmetic, share, False, advice)
