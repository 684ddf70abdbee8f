"""`to: mla`: keys and values of all heads become one latent and one shared rotated key.

The published method, TransMLA (arXiv 2502.07864): rotate heads per frequency so that few
components carry the rotation (`mla_rotary`), balance and compress the rest with the values
(`mla_latent`), and let queries absorb both. Exact with every pair rotated at fold 1 and full
rank. Derivation with the symbols used here: docs/math/mla.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from reattend.mixers.config import Frozen, StreamConfig
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.latent import LatentAttention, LatentConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, Exactness
from reattend.passes.rewrite.mla_latent import LatentChoice, joint_pca
from reattend.passes.rewrite.mla_rotary import (
    RotaryChoice,
    select_real,
    slot_columns,
    smallest_fold,
)
from reattend.statistics import SiteStatistics


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
        return Refusal("both kv_lora_rank and kv_keep are set; give one")
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


class ToMla(Conversion):
    """GQA or MHA to multi-head latent attention."""

    name = "mla"
    Options = MlaOptions
    needs = frozenset({"gram"})

    def check(self, config: DenseConfig, options: MlaOptions) -> Refusal | None:
        """Reads no weight; the arithmetic is in the message."""
        if config.cross:
            return Refusal("cross-attention: its keys are cached once per prompt, MLA saves little")
        if config.relative is not None:
            return Refusal("a relative position bias is not supported by to: mla yet")
        if config.v.norm is not None:
            return Refusal("values are normalised per head, which no shared latent can carry")
        for name, stream in (("queries", config.q), ("keys", config.k)):
            if stream.norm is not None and stream.norm.after_rotary:
                return Refusal(f"{name} are normalised after rotation")
        if config.core.pattern == "chunked":
            return Refusal("chunked attention is not supported by to: mla yet")
        if config.core.softcap and config.k.bias and config.k.norm is None:
            return Refusal(
                "a key bias under a softcap cannot be dropped (softmax does not cancel it)"
            )
        if options.q_lora_rank and (config.q.norm or config.q.bias):
            return Refusal("q_lora_rank with a query norm or bias is not supported yet")
        if options.q_lora_rank and options.q_lora_rank > min(
            config.hidden_size, config.core.heads * config.core.qk_head_dim
        ):
            return Refusal(f"q_lora_rank {options.q_lora_rank} is larger than the query's rank")
        sizes = resolve(config, options)
        if isinstance(sizes, Refusal):
            return sizes
        cached, before = sizes.kv_lora_rank + sizes.qk_rope_head_dim, config.cache_per_token
        if cached >= before and not options.allow_growth and not _is_exact(config, sizes, options):
            return Refusal(
                f"the cache would not shrink: {sizes.kv_lora_rank} + {sizes.qk_rope_head_dim} = "
                f"{cached} numbers per token against {before} "
                f"({config.core.kv_heads} kv heads x ({config.core.qk_head_dim} + "
                f"{config.core.v_head_dim})); lower kv_lora_rank or set allow_growth: true"
            )
        return None

    def exact_setting(self, config: DenseConfig) -> MlaOptions:
        """Every pair rotated, full rank: r + R = the original cache."""
        pairs = config.rotary.pairs if config.rotary else 0
        rope = 2 * pairs * config.core.kv_heads
        rank = config.cache_per_token - rope
        return MlaOptions(
            kv_lora_rank=rank, qk_rope_head_dim=rope, fold=1 if pairs else "auto", allow_growth=True
        )

    def cost(self, config: DenseConfig, options: MlaOptions) -> Cost:
        """Absorbed decode: 2 r + R multiply-adds per head and key."""
        sizes = resolve(config, options)
        assert not isinstance(sizes, Refusal)
        with torch.device("meta"):
            mixer = LatentAttention(_config(config, sizes, options))
        parameters = sum(p.numel() for p in mixer.parameters())
        context, core = 4096, config.core
        r, rope = sizes.kv_lora_rank, sizes.qk_rope_head_dim
        absorb = core.heads * r * (core.qk_head_dim + core.v_head_dim)
        without_up = parameters - core.kv_heads * r * (core.qk_head_dim + core.v_head_dim)
        flops = without_up + absorb + core.heads * context * (2 * r + rope)
        return Cost(r + rope, parameters, 2 * flops, context)

    def build(
        self, dense: DenseAttention, statistics: SiteStatistics, options: MlaOptions
    ) -> Built:
        """Select, compress, absorb; all in float64, stored in the source dtype."""
        config = dense.config
        sizes = resolve(config, options)
        assert not isinstance(sizes, Refusal)
        width = config.core.kv_heads * config.core.qk_head_dim
        gram = statistics.gram
        choice = select_real(
            config, _with_bias(dense, statistics, width), sizes.qk_rope_head_dim, sizes.fold
        )
        latent = joint_pca(gram, choice, width, sizes.kv_lora_rank, options.balance)
        with torch.device("meta"):
            mixer = LatentAttention(_config(config, sizes, options))
        state = _weights(dense, choice, latent, mixer.config, statistics)
        dtype, device = dense.q_proj.weight.dtype, dense.q_proj.weight.device
        mixer.load_state_dict(
            {k: v.to(device, dtype).contiguous() for k, v in state.items()},
            strict=True,
            assign=True,
        )
        for parameter in mixer.parameters():
            parameter.requires_grad_(True)
        kept = sum(latent.energy[: sizes.kv_lora_rank])
        exactness: Exactness = "exact" if _is_exact(config, sizes, options) else "bounded"
        return Built(
            mixer.eval(),
            exactness,
            {
                "kv_lora_rank": sizes.kv_lora_rank,
                "qk_rope_head_dim": sizes.qk_rope_head_dim,
                "fold": sizes.fold,
                "balance": latent.balance,
                "discarded_energy": max(0.0, 1.0 - kept),
                "energy": latent.energy,
                "rotary_energy": sum(choice.energy),
            },
        )


def _is_exact(config: DenseConfig, sizes: Sizes, options: MlaOptions) -> bool:
    """All pairs rotated unmixed, full rank, and nothing else in the way."""
    if options.latent_norm != "none" or options.q_lora_rank is not None:
        return False
    pairs = config.rotary.pairs if config.rotary else 0
    all_rotated = sizes.qk_rope_head_dim == 2 * pairs * config.core.kv_heads
    full = sizes.kv_lora_rank + sizes.qk_rope_head_dim == config.cache_per_token
    return all_rotated and full and sizes.fold == 1


def _config(config: DenseConfig, sizes: Sizes, options: MlaOptions) -> LatentConfig:
    """The mixer's description; key and value scales are folded into weights."""
    has_out = config.out_features is not None
    normed = config.q.norm is not None or config.k.norm is not None
    data = config.model_dump(exclude={"kind"})
    data["k"] = StreamConfig(bias=config.k.bias and normed, norm=config.k.norm).model_dump()
    data["v"] = StreamConfig().model_dump()
    data["out_bias"] = config.out_bias or (has_out and config.v.bias)
    slots, pairs = sizes.qk_rope_head_dim // 2, config.rotary.pairs if config.rotary else 0
    return LatentConfig(
        **data,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_rope_head_dim=sizes.qk_rope_head_dim,
        rope_columns=slot_columns(pairs, slots, sizes.fold),
        q_lora_rank=options.q_lora_rank,
        latent_norm=options.latent_norm,
        value_bias=config.v.bias and not has_out,
        rope_key_bias=config.k.bias and not normed and sizes.qk_rope_head_dim > 0,
    )


def _with_bias(dense: DenseAttention, statistics: SiteStatistics, width: int) -> Tensor:
    """Second moment of the keys as they are rotated: bias included."""
    gram = statistics.gram[:width, :width]
    bias = dense.k_proj.bias
    if bias is None or dense.k_norm is not None:
        return gram
    b, s = bias.detach().double().cpu(), statistics.total[:width]
    return gram + torch.outer(b, s) + torch.outer(s, b) + statistics.count * torch.outer(b, b)


def _weights(
    dense: DenseAttention,
    choice: RotaryChoice,
    latent: LatentChoice,
    config: LatentConfig,
    statistics: SiteStatistics,
) -> dict[str, Tensor]:
    """Every tensor of the new mixer, float64."""
    core = config.core
    groups, d, e = core.kv_heads, core.qk_head_dim, core.v_head_dim
    key_width = groups * d
    old = {k: v.detach().double().cpu() for k, v in dense.state_dict().items()}
    scale_k, scale_v = dense.config.k.scale, dense.config.v.scale
    rope_rows = torch.zeros(choice.key_rope.shape[0], latent.down.shape[1], dtype=torch.float64)
    rope_rows[:, :key_width] = choice.key_rope
    rows = torch.cat([latent.down, rope_rows])
    normed = dense.config.q.norm is not None or dense.config.k.norm is not None
    state: dict[str, Tensor] = {}
    if normed:
        state["kv_a_proj_with_mqa.weight"] = rows
        state["k_proj.weight"], state["v_proj.weight"] = old["k_proj.weight"], old["v_proj.weight"]
        state["q_rope"] = choice.query_rope.reshape(-1, groups, d).transpose(0, 1) * scale_k
        state |= {k: v for k, v in old.items() if k.split(".")[0] in ("q_norm", "k_norm", "q_proj")}
        if "k_proj.bias" in old:
            state["k_proj.bias"] = old["k_proj.bias"]
    else:
        both = torch.cat([old["k_proj.weight"], old["v_proj.weight"]])
        state["kv_a_proj_with_mqa.weight"] = rows @ both
        state |= _query_weights(old, choice, config, statistics, scale_k)
        if config.rope_key_bias:
            state["k_rope_bias"] = choice.key_rope @ old["k_proj.bias"]
    up = torch.cat(
        [
            (latent.key_up * scale_k).reshape(groups, d, -1),
            (latent.value_up * scale_v).reshape(groups, e, -1),
        ],
        1,
    )
    up = up.flatten(0, 1)
    if config.latent_norm == "rms":
        gain = _mean_rms(latent.down, statistics)
        state["kv_a_layernorm.weight"] = torch.full((config.kv_lora_rank,), gain)
    state["kv_b_proj.weight"] = up
    state |= {k: v for k, v in old.items() if k.startswith("o_proj.")}
    if "v_proj.bias" in old:
        bias = (old["v_proj.bias"] * scale_v).reshape(groups, e)
        if config.out_features is None:
            state["v_bias"] = bias
        else:
            spread = bias.repeat_interleave(core.heads // groups, 0).flatten()
            state["o_proj.bias"] = old["o_proj.weight"] @ spread + old.get("o_proj.bias", 0.0)
    return state


def _query_weights(
    old: dict[str, Tensor],
    choice: RotaryChoice,
    config: LatentConfig,
    statistics: SiteStatistics,
    scale_k: float,
) -> dict[str, Tensor]:
    """q rows per head [nope d | rope R]: the head itself, and its share of the rotated slots."""
    core = config.core
    heads, groups, d = core.heads, core.kv_heads, core.qk_head_dim
    turn_gRd = choice.query_rope.reshape(-1, groups, d).transpose(0, 1) * scale_k
    turn_hRd = turn_gRd.repeat_interleave(heads // groups, 0)

    def widen(rows: Tensor) -> Tensor:
        per_head = rows.reshape(heads, d, -1)
        return torch.cat([per_head, turn_hRd @ per_head], 1).flatten(0, 1)

    if config.q_lora_rank is None:
        state = {"q_proj.weight": widen(old["q_proj.weight"])}
        if config.q.bias:
            state["q_proj.bias"] = widen(old["q_proj.bias"][:, None])[:, 0]
        return state
    assert statistics.query_gram is not None
    values, vectors = torch.linalg.eigh(statistics.query_gram)
    basis = vectors[:, torch.argsort(values, descending=True)][:, : config.q_lora_rank]
    return {
        "q_proj.q_a_proj.weight": basis.t() @ old["q_proj.weight"],
        "q_proj.q_b_proj.weight": widen(basis),
    }


def _mean_rms(down: Tensor, statistics: SiteStatistics) -> float:
    """Root mean square of the latent over the calibration tokens: the gain that keeps its size."""
    energy = torch.einsum("ry,yz,rz->", down, statistics.gram, down)
    return float((energy / (statistics.count * down.shape[0])).sqrt())
