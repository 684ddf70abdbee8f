"""`to: mla`: keys and values of all heads become one latent and one shared rotated key.

Mix heads per frequency so that few components carry the rotation (`mla_mixing`, `mla_select`; the
published way, TransMLA arXiv 2502.07864, in `mla_rotary`), put a constant in place of the rotations
that are dropped (`mla_phase`), compress the rest with the values (`mla_latent`), and let queries
absorb it all (`mla_weights`). `mla_budget` shares one budget over layers. Exact with every pair
rotated at fold 1 and full rank. Derivation with the symbols used here: docs/math/mla.md.
"""

from __future__ import annotations

import torch

from reattend.errors import ArgumentError
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.latent import LatentAttention
from reattend.mixers.latent_config import LatentConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import (
    Built,
    Conversion,
    Cost,
    Exactness,
    Measure,
    Subject,
    regrouped,
)
from reattend.passes.rewrite.mla_budget import allocate
from reattend.passes.rewrite.mla_error import best_norm, best_solution
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_select import planned_columns
from reattend.passes.rewrite.mla_sizes import FIT, is_exact, resolve
from reattend.passes.rewrite.mla_solve import assemble, mixer_config, solve
from reattend.passes.rewrite.mla_weights import kept_modules
from reattend.statistics import Need, SiteStatistics

__all__ = ["MlaOptions", "ToMla", "resolve"]


class ToMla(Conversion):
    """GQA or MHA to multi-head latent attention."""

    name = "mla"
    Options = MlaOptions
    needs = frozenset({"gram"})

    def check(self, config: DenseConfig, options: MlaOptions) -> Refusal | None:
        """Reads no weight; the arithmetic is in the message."""
        if config.cross:
            return Refusal("cross-attention: its keys are cached once per prompt, MLA saves little")
        if config.added is not None:
            return Refusal("what is added to the scores is computed by the model's own steps")
        for name, stream in (("keys", config.k), ("values", config.v)):
            if stream.opaque is not None:
                return Refusal(f"{name} are made by the model's own steps, not by a projection")
        if (moved := regrouped(config)) is not None:
            return moved
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
        measured = self.wants(config, options) & {"attention", "sample"}
        if config.core.pattern == "opaque" and measured:
            return Refusal(
                "the mask has no fixed pattern, and these options measure attention, which needs "
                "it; use the options of the plan transmla-paper"
            )
        outside = config.q.opaque is not None and bool(config.q.opaque.extras)
        if outside and measured:
            return Refusal(
                "queries read more than the block's input, and these options measure queries; use "
                "the options of the plan transmla-paper"
            )
        if options.q_lora_rank and config.q.opaque is not None:
            return Refusal("q_lora_rank needs queries that a projection makes")
        if options.q_lora_rank and options.q_lora_rank > min(
            config.hidden_size, config.core.heads * config.core.qk_head_dim
        ):
            return Refusal(f"q_lora_rank {options.q_lora_rank} is larger than the query's rank")
        turned = 2 * config.rotary.pairs if config.rotary else config.core.qk_head_dim
        if options.rope_select == "mean-key" and turned != config.core.qk_head_dim:
            return Refusal("rope_select: mean-key is not defined for partial rotary")
        sizes = resolve(config, options)
        if isinstance(sizes, Refusal):
            return sizes
        cached, before = sizes.kv_lora_rank + sizes.qk_rope_head_dim, config.cache_per_token
        if cached >= before and not options.allow_growth and not is_exact(config, sizes, options):
            return Refusal(
                f"the cache would not shrink: {sizes.kv_lora_rank} + {sizes.qk_rope_head_dim} = "
                f"{cached} numbers per token against {before} "
                f"({config.core.kv_heads} kv heads x ({config.core.qk_head_dim} + "
                f"{config.core.v_head_dim})); lower kv_lora_rank or set allow_growth: true "
                f"({FIT})"
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
            columns = (0,) * (sizes.qk_rope_head_dim // 2)
            mixer = LatentAttention(mixer_config(config, sizes, options, columns))
        parameters = sum(p.numel() for p in mixer.parameters())
        kept = kept_modules(config, options.q_lora_rank)
        own = sum(p.numel() for n, p in mixer.named_parameters() if n.split(".")[0] in kept)
        context, core = 4096, config.core
        r, rope = sizes.kv_lora_rank, sizes.qk_rope_head_dim
        absorb = core.heads * r * (core.qk_head_dim + core.v_head_dim)
        without_up = parameters - core.kv_heads * r * (core.qk_head_dim + core.v_head_dim)
        flops = without_up + absorb + core.heads * context * (2 * r + rope)
        return Cost(r + rope, parameters, 2 * flops, context, own)

    def build(
        self, dense: DenseAttention, statistics: SiteStatistics, options: MlaOptions
    ) -> Built:
        """Select, compress, absorb; all in float64, stored in the source dtype."""
        config = dense.config
        sizes = resolve(config, options)
        assert not isinstance(sizes, Refusal)
        _require(statistics, self.wants(config, options))
        if options.derived:
            options, solved = best_solution(dense, statistics, options, sizes)
        else:
            solved = solve(dense, statistics, options, sizes)
        if options.latent_norm == "rms":
            mixer, latent = best_norm(dense, statistics, options, sizes, solved)
        else:
            mixer, latent = assemble(dense, statistics, options, sizes, solved)
        kept = sum(latent.energy[: latent.rows])
        exactness: Exactness = "exact" if is_exact(config, sizes, options) else "bounded"
        return Built(
            mixer,
            exactness,
            {
                "kv_lora_rank": sizes.kv_lora_rank,
                "qk_rope_head_dim": sizes.qk_rope_head_dim,
                "fold": sizes.fold,
                "balance": latent.balance,
                "discarded_energy": max(0.0, 1.0 - kept),
                "energy": latent.energy,
                "rotary_energy": sum(solved.rotary.energy),
            },
        )

    def wants(self, config: DenseConfig, options: MlaOptions) -> frozenset[Need]:
        """Beside the Gram matrix: what the chosen methods read."""
        found: set[Need] = {"gram"}
        if options.q_lora_rank is not None:
            found.add("queries")
        by_loss = options.mixing == "balanced" or options.rope_select in ("global", "per-head")
        if by_loss or options.phase == "mean" or options.latent == "output":
            found.add("attention")
        if options.latent == "care":
            found.add("inputs")
        measured = options.derived or options.latent_norm == "rms"
        if measured or (options.automatic and options.allocate == "error"):
            found.add("sample")
        return frozenset(found)

    def outcome(self, config: DenseConfig, options: MlaOptions) -> LatentConfig | None:
        """Known where neither sizes nor frequencies are chosen from statistics."""
        sizes = resolve(config, options)
        if isinstance(sizes, Refusal) or options.automatic:
            return None
        columns = planned_columns(config, options, sizes)
        return None if columns is None else mixer_config(config, sizes, options, columns)

    def for_layer(self, options: MlaOptions, layer: int, layers: int) -> MlaOptions | Refusal:
        """One entry of every per-layer list."""
        chosen = options.at_layer(layer, layers)
        return Refusal(chosen) if isinstance(chosen, str) else chosen

    def undecided(self, options: MlaOptions) -> bool:
        """`auto` anywhere."""
        return options.automatic

    def together(self, options: MlaOptions) -> str:
        """Widths listed by layer do not divide a budget."""
        return options.model_dump_json(exclude={"qk_rope_head_dim"})

    def allocate(self, sites: list[Subject], measure: Measure) -> list[MlaOptions]:
        """Sizes of all sites from one budget."""
        return allocate(sites, measure)


def _require(statistics: SiteStatistics, wants: frozenset[Need]) -> None:
    """Statistics of another plan would be wrong without any sign of it."""
    there = {
        "gram": True,
        "queries": statistics.query_gram is not None,
        "attention": statistics.attention is not None,
        "inputs": statistics.input_gram is not None,
        "sample": bool(statistics.samples),
    }
    if missing := sorted(need for need in wants if not there[need]):
        raise ArgumentError(
            f"these options of to: mla read statistics that were not collected: "
            f"{', '.join(missing)}",
            next_step="collect with needs=ToMla().wants(config, options) for every site",
        )
