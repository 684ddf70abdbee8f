"""Sizes of an MLA conversion: options in, r, R and fold out, or why they do not fit."""

from __future__ import annotations

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_rotary import smallest_fold

#: where a shape that does not fit is answered with those that do
FIT = "`reattend plans fit MODEL` says what server shapes keep of a model's cache"


class Sizes(Frozen):
    """r, R and fold as they will be used."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    fold: int


def resolve(config: DenseConfig, options: MlaOptions) -> Sizes | Refusal:
    """Turn options into sizes, or say why they do not fit this block.

    `auto` gives the sizes of an even split; `mla_budget` replaces them once there are statistics.
    """
    core = config.core
    pairs = config.rotary.pairs if config.rotary else 0
    groups, cache = core.kv_heads, config.cache_per_token
    refusal = _clash(options)
    if refusal is not None:
        return refusal
    rope = options.qk_rope_head_dim
    if not isinstance(rope, int):
        rope = _default_rope(config, options)
    most = min(2 * pairs, core.qk_head_dim) if options.rope_select == "mean-key" else None
    if rope % 2 or rope > 2 * pairs * groups or (most is not None and rope > most):
        return Refusal(
            f"qk_rope_head_dim {rope} must be even and at most "
            f"{2 * pairs * groups if most is None else most} "
            f"({pairs} rotary pairs x 2 x {groups if most is None else 1} kv heads)"
        )
    full = full_rank(config, options, rope)
    if isinstance(options.kv_lora_rank, int):
        rank = options.kv_lora_rank
    elif options.kv_keep is not None:
        rank = int(options.kv_keep * cache) - rope
    else:
        return Refusal("no size given: set kv_lora_rank, or kv_keep (share of the original cache)")
    if rank < 1:
        return Refusal(f"kv_keep leaves no latent: {options.kv_keep} x {cache} - {rope} = {rank}")
    if rank > full:
        return Refusal(
            f"kv_lora_rank {rank} is larger than possible: {groups} kv heads x "
            f"({core.qk_head_dim} + {core.v_head_dim}) - {cache - full} rotary = {full} ({FIT})"
        )
    fold = _fold(config, options, rope // 2)
    return fold if isinstance(fold, Refusal) else Sizes(
        kv_lora_rank=rank, qk_rope_head_dim=rope, fold=fold
    )  # fmt: skip


def full_rank(config: DenseConfig, options: MlaOptions, rope: int) -> int:
    """The largest useful r beside R = `rope`."""
    groups = config.core.kv_heads if options.rope_select == "mean-key" else 1
    return config.cache_per_token - groups * rope


def _clash(options: MlaOptions) -> Refusal | None:
    """Sizes that contradict each other."""
    if isinstance(options.kv_lora_rank, int) and options.kv_keep is not None:
        return Refusal(
            "both kv_lora_rank and kv_keep are set; give one (--set kv_keep=null drops the share)"
        )
    if not options.automatic:
        return None
    if options.kv_keep is None:
        return Refusal("auto sizes share one budget: set kv_keep (share of the original cache)")
    if options.allocate == "energy" and options.qk_rope_head_dim == "auto":
        return Refusal("allocate: energy shares ranks; give qk_rope_head_dim a number or nothing")
    return None


def _fold(config: DenseConfig, options: MlaOptions, slots: int) -> int | Refusal:
    """Frequencies per band; 1 for every selection but the published one."""
    pairs = config.rotary.pairs if config.rotary else 0
    if not slots:
        return 1
    if options.published:
        fold = smallest_fold(pairs, slots) if options.fold == "auto" else options.fold
        if not fold or pairs % fold or (fold * slots) % pairs:
            return Refusal(
                f"qk_rope_head_dim {2 * slots} cannot be spread over {pairs} frequencies with "
                f"fold {options.fold}: fold x {slots} must be a multiple of {pairs}"
            )
        return fold
    if options.rope_select == "per-frequency" and slots % pairs and pairs % slots:
        return Refusal(
            f"qk_rope_head_dim {2 * slots} cannot be spread evenly: {slots} slots and {pairs} "
            "frequencies must divide one another (rope_select: global takes any number)"
        )
    if options.rope_select == "per-head" and slots % config.core.kv_heads:
        return Refusal(
            f"qk_rope_head_dim {2 * slots} cannot be shared by {config.core.kv_heads} kv heads: "
            "rope_select: per-head keeps as many pairs in each"
        )
    return 1


def _default_rope(config: DenseConfig, options: MlaOptions) -> int:
    """One slot per frequency where the cache allows, else halved to at most half of it.

    Removing rotation costs more than rank at moderate sizes (measured on the shipped model), and
    with one slot per frequency no fold is needed.
    """
    if config.rotary is None:
        return 0
    rope = 2 * config.rotary.pairs
    if isinstance(options.kv_lora_rank, int):
        target = min(2 * options.kv_lora_rank, config.cache_per_token)
    else:
        target = int((options.kv_keep or 1.0) * config.cache_per_token)
    while rope > 2 and rope > target // 2:
        rope //= 2
    rope -= rope % 2
    if options.rope_select == "per-head":  # as many pairs in every head, at least one
        step = 2 * config.core.kv_heads
        return max(step, rope - rope % step)
    return rope


def is_exact(config: DenseConfig, sizes: Sizes, options: MlaOptions) -> bool:
    """All pairs rotated unmixed, full rank, and nothing else in the way."""
    if options.latent_norm != "none" or options.q_lora_rank is not None:
        return False
    if options.rope_select == "mean-key":
        return False
    pairs = config.rotary.pairs if config.rotary else 0
    all_rotated = sizes.qk_rope_head_dim == 2 * pairs * config.core.kv_heads
    full = sizes.kv_lora_rank + sizes.qk_rope_head_dim == config.cache_per_token
    return all_rotated and full and sizes.fold == 1


def folds_values(config: DenseConfig) -> bool:
    """Whether a constant in every value reaches the output projection whole, as its bias."""
    plain = config.gate is None and config.join is None and not config.core.sinks
    return config.out_features is not None and plain


def centred(config: DenseConfig, sizes: Sizes, options: MlaOptions) -> bool:
    """Whether a mean is taken out and put back as a bias; at full rank there is nothing to do."""
    full = sizes.kv_lora_rank == full_rank(config, options, sizes.qk_rope_head_dim)
    if config.core.sinks:  # probabilities do not sum to one, so no constant cancels
        return False
    return options.center and options.latent in ("pca", "output") and not full
