"""`to: mla`: keys and values of all heads become one latent and one shared rotated key.

The published method, TransMLA (arXiv 2502.07864): rotate heads per frequency so that few
components carry the rotation (`mla_rotary`), balance and compress the rest with the values
(`mla_latent`), and let queries absorb both (`mla_weights`). Exact with every pair rotated at
fold 1 and full rank. Derivation with the symbols used here: docs/math/mla.md.
"""

from __future__ import annotations

import torch

from reattend.mixers.config import StreamConfig
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.latent import LatentAttention, LatentConfig, has_own_query
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, Exactness, Need
from reattend.passes.rewrite.mla_latent import joint_pca
from reattend.passes.rewrite.mla_rotary import select_real, slot_columns
from reattend.passes.rewrite.mla_sizes import MlaOptions, Sizes, is_exact, resolve
from reattend.passes.rewrite.mla_weights import biased_key_gram, latent_weights
from reattend.statistics import SiteStatistics

__all__ = ["MlaOptions", "ToMla", "resolve"]


class ToMla(Conversion):
    """GQA or MHA to multi-head latent attention."""

    name = "mla"
    Options = MlaOptions
    needs = frozenset({"gram"})

    def wanted(self, options: MlaOptions) -> frozenset[Need]:
        """Moments of queries too where their rank is cut."""
        return self.needs if options.q_lora_rank is None else self.needs | {"queries"}

    def check(self, config: DenseConfig, options: MlaOptions) -> Refusal | None:
        """Reads no weight; the arithmetic is in the message."""
        if config.cross:
            return Refusal("cross-attention: its keys are cached once per prompt, MLA saves little")
        if config.added is not None:
            return Refusal("what is added to the scores is computed by the model's own steps")
        for name, stream in (("keys", config.k), ("values", config.v)):
            if stream.opaque is not None:
                return Refusal(f"{name} are made by the model's own steps, not by a projection")
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
        if options.q_lora_rank and config.q.opaque is not None:
            return Refusal("q_lora_rank needs queries that a projection makes")
        if options.q_lora_rank and options.q_lora_rank > min(
            config.hidden_size, config.core.heads * config.core.qk_head_dim
        ):
            return Refusal(f"q_lora_rank {options.q_lora_rank} is larger than the query's rank")
        sizes = resolve(config, options)
        if isinstance(sizes, Refusal):
            return sizes
        cached, before = sizes.kv_lora_rank + sizes.qk_rope_head_dim, config.cache_per_token
        if cached >= before and not options.allow_growth and not is_exact(config, sizes, options):
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
            config, biased_key_gram(dense, statistics, width), sizes.qk_rope_head_dim, sizes.fold
        )
        latent = joint_pca(gram, choice, width, sizes.kv_lora_rank, options.balance)
        with torch.device("meta"):
            mixer = LatentAttention(_config(config, sizes, options))
        state = latent_weights(dense, choice, latent, mixer.config, statistics)
        dtype, device = dense.k_proj.weight.dtype, dense.k_proj.weight.device
        mixer.load_state_dict(
            {k: v.to(device, dtype).contiguous() for k, v in state.items()},
            strict=True,
            assign=True,
        )
        for parameter in mixer.parameters():
            parameter.requires_grad_(True)
        kept = sum(latent.energy[: sizes.kv_lora_rank])
        exactness: Exactness = "exact" if is_exact(config, sizes, options) else "bounded"
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


def _config(config: DenseConfig, sizes: Sizes, options: MlaOptions) -> LatentConfig:
    """The mixer's description; key and value scales are folded into weights."""
    plain = config.gate is None and config.join is None and not config.core.sinks
    folds = config.out_features is not None and plain  # a value bias reaches the output whole
    normed = has_own_query(config)
    data = config.model_dump(exclude={"kind"})
    data["k"] = StreamConfig(bias=config.k.bias and normed, norm=config.k.norm).model_dump()
    data["v"] = StreamConfig().model_dump()
    data["out_bias"] = config.out_bias or (folds and config.v.bias)
    slots, pairs = sizes.qk_rope_head_dim // 2, config.rotary.pairs if config.rotary else 0
    return LatentConfig(
        **data,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_rope_head_dim=sizes.qk_rope_head_dim,
        rope_columns=slot_columns(pairs, slots, sizes.fold),
        q_lora_rank=options.q_lora_rank,
        latent_norm=options.latent_norm,
        value_bias=config.v.bias and not folds,
        rope_key_bias=config.k.bias and not normed and sizes.qk_rope_head_dim > 0,
        key_bias=config.k.bias and not normed and config.core.sinks,
    )
