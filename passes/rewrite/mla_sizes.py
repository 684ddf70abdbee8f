"""Sizes of an MLA conversion: options in, r, R and fold out, or why they do not fit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mla_rotary import smallest_fold


class MlaOptions(Frozen):
    """Options of `to: mla`.

    Attributes:
        kv_lora_rank: r, rows of the latent.
        qk_rope_head_dim: R, shared rotary dimensions (even).
        kv_keep: share of the original cache instead of r; r = share x cache - R.
        fold: adjacent frequencies mixed in the selection; `auto` is the smallest that fits.
        balance: weight of keys against values in the joint PCA (TransMLA's balance_kv_ratio).
        q_lora_rank: rank of the query projection, none for a full one.
        latent_norm: `rms` puts DeepSeek's RMSNorm on the latent, its gain set to the mean norm.
        allow_growth: accept a cache larger than the original.
    """

    kv_lora_rank: int | None = Field(default=None, ge=1)
    qk_rope_head_dim: int | None = Field(default=None, ge=0)
    kv_keep: float | None = Field(default=None, gt=0, le=1)
    fold: int | Literal["auto"] = "auto"
    balance: float = Field(default=1.0, gt=0)
    q_lora_rank: int | None = Field(default=None, ge=1)
    latent_norm: Literal["none", "rms"] = "none"
    allow_growth: bool = False


class Sizes(Frozen):
    """r, R and fold as they will be used."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    fold: int


def resolve(config: DenseConfig, options: MlaOptions) -> Sizes | Refusal:
    """Turn options into sizes, or say why they do not fit this block."""
    core = config.core
    pairs = config.rotary.pairs if config.rotary else 0
    groups, cache = core.kv_heads, config.cache_per_token
    if options.kv_lora_rank is not None and options.kv_keep is not None:
        return Refusal(
            "both kv_lora_rank and kv_keep are set; give one (--set kv_keep=null drops the share)"
        )
    rope = options.qk_rope_head_dim
    if rope is None:
        rope = _default_rope(config, options)
    if rope % 2 or rope > 2 * pairs * groups:
        return Refusal(
            f"qk_rope_head_dim {rope} must be even and at most {2 * pairs * groups} "
            f"({pairs} rotary pairs x 2 x {groups} kv heads)"
        )
    full = groups * (core.qk_head_dim + core.v_head_dim) - rope
    if options.kv_keep is not None:
        rank = int(options.kv_keep * cache) - rope
    elif options.kv_lora_rank is not None:
        rank = options.kv_lora_rank
    else:
        return Refusal("no size given: set kv_lora_rank, or kv_keep (share of the original cache)")
    if rank < 1:
        return Refusal(f"kv_keep leaves no latent: {options.kv_keep} x {cache} - {rope} = {rank}")
    if rank > full:
        return Refusal(
            f"kv_lora_rank {rank} is larger than possible: {groups} kv heads x "
            f"({core.qk_head_dim} + {core.v_head_dim}) - {rope} rotary = {full}"
        )
    fold = options.fold
    if rope and fold == "auto":
        fold = smallest_fold(pairs, rope // 2)
    if rope and (not fold or pairs % int(fold) or (int(fold) * rope // 2) % pairs):
        return Refusal(
            f"qk_rope_head_dim {rope} cannot be spread over {pairs} frequencies with fold "
            f"{options.fold}: fold x {rope // 2} must be a multiple of {pairs}"
        )
    return Sizes(kv_lora_rank=rank, qk_rope_head_dim=rope, fold=int(fold) if rope else 1)


def _default_rope(config: DenseConfig, options: MlaOptions) -> int:
    """One slot per frequency where the cache allows, else halved to at most half of it.

    Removing rotation costs more than rank at moderate sizes (measured on the shipped model), and
    with one slot per frequency no fold is needed.
    """
    if config.rotary is None:
        return 0
    rope = 2 * config.rotary.pairs
    if options.kv_keep is not None:
        target = int(options.kv_keep * config.cache_per_token)
    else:
        target = min(2 * (options.kv_lora_rank or 1), config.cache_per_token)
    while rope > 2 and rope > target // 2:
        rope //= 2
    return rope - rope % 2


def is_exact(config: DenseConfig, sizes: Sizes, options: MlaOptions) -> bool:
    """All pairs rotated unmixed, full rank, and nothing else in the way."""
    if options.latent_norm != "none" or options.q_lora_rank is not None:
        return False
    pairs = config.rotary.pairs if config.rotary else 0
    all_rotated = sizes.qk_rope_head_dim == 2 * pairs * config.core.kv_heads
    full = sizes.kv_lora_rank + sizes.qk_rope_head_dim == config.cache_per_token
    return all_rotated and full and sizes.fold == 1
