"""`to: attn-moe`: several attention experts, of which every token uses a mean weighed by a router.

BAM (Zhang et al., arXiv 2408.08274) joins models that were trained apart on domains of their own:
attention experts all run, weighed by a softmax over experts, and have keys and values of their own
or share one set, which keeps the cache. Here all experts start as the block itself, so the result
is the block whatever the router says, because its weights sum to 1. The router starts at random:
that is what makes experts differ once they are trained. Training by distillation has nothing to
teach, as nothing was lost; use `calibrate: {loss: lm}`. Derivation: docs/math/heads.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.routed import RoutedAttention
from reattend.mixers.routed_config import RoutedConfig
from reattend.parts import kept_heads, why_whole
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, dense_cost
from reattend.passes.rewrite.sparse_build import like

#: of the generator that the router's weights come from
SEED = 0


class AttnMoeOptions(Frozen):
    """How many experts, and what they share.

    Attributes:
        experts: attention blocks of the original's sizes; 1: the block as it is.
        kv: one set of keys and values for all experts (`shared`), or one each (`separate`).
        router_init: standard deviation of the router's weights, over the square root of the width
            of the block's input. At 0 all experts would learn the same.
    """

    experts: int = Field(default=2, ge=1)
    kv: Literal["shared", "separate"] = "shared"
    router_init: float = Field(default=0.5, ge=0)


class ToAttnMoe(Conversion):
    """Any block whose heads can be told apart."""

    name = "attn-moe"
    Options = AttnMoeOptions

    def check(self, config: DenseConfig, options: AttnMoeOptions) -> Refusal | None:
        """Reads no weight."""
        if options.experts == 1:
            return None
        why = why_whole(config)
        if why is None and config.out_features is None:
            why = "it has no output projection of its own that could add them up"
        return None if why is None else Refusal(f"a block cannot be several experts: {why}")

    def solves(self, options: AttnMoeOptions) -> int:
        """Nothing is measured."""
        return 0

    def outcome(self, config: DenseConfig, options: AttnMoeOptions) -> Frozen:
        """The mixer's description."""
        if options.experts == 1:
            return config
        kv_heads, heads = spread(config, options)
        core = config.core.model_copy(update={"heads": len(heads), "kv_heads": len(kv_heads)})
        alibi = None if config.alibi is None else tuple(config.alibi[h] for h in heads)
        return described(config.model_copy(update={"core": core, "alibi": alibi}), config, options)

    def exact_setting(self, config: DenseConfig) -> AttnMoeOptions:
        """Two experts that are the block; exact like any number."""
        return AttnMoeOptions()

    def cost(self, config: DenseConfig, options: AttnMoeOptions) -> Cost:
        """That of a block with so many more heads, and the router."""
        if options.experts == 1:
            return dense_cost(config)
        kv_heads, heads = spread(config, options)
        core = config.core.model_copy(update={"heads": len(heads), "kv_heads": len(kv_heads)})
        wide = dense_cost(config.model_copy(update={"core": core}))
        router = options.experts * config.hidden_size
        return Cost(
            wide.cache, wide.parameters + router, wide.flops_per_token + 2 * router, wide.context
        )

    def build(self, dense: DenseAttention, statistics: Any, options: AttnMoeOptions) -> Built:
        """Copies of the block side by side, and a router at random."""
        told = {"experts": options.experts, "kv": options.kv}
        if options.experts == 1:
            return Built(dense, "exact", told)
        wide = kept_heads(dense, *spread(dense.config, options))
        mixer = like(wide, RoutedAttention)
        mixer.begin(described(wide.config, dense.config, options))
        assert mixer.router.routed is not None
        weight = mixer.router.routed.weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(SEED))
        weight.data = noise * (options.router_init / dense.config.hidden_size**0.5)
        mixer.router.to(next(dense.parameters())).train(dense.training)
        return Built(mixer, "exact", told)


def spread(config: DenseConfig, options: AttnMoeOptions) -> tuple[list[int], list[int]]:
    """The original's number of each KV group and query head of the result.

    Groups stay together, and within each come the experts: a query head then reads its own group
    whether experts share it or not.
    """
    core, experts = config.core, options.experts
    each = core.heads // core.kv_heads
    groups = range(core.kv_heads)
    kv_heads = [g for g in groups for _ in range(experts if options.kv == "separate" else 1)]
    return kv_heads, [g * each + i for g in groups for _ in range(experts) for i in range(each)]


def described(wide: DenseConfig, config: DenseConfig, options: AttnMoeOptions) -> RoutedConfig:
    """The mixer of a block `wide` that holds the experts of `config`."""
    return RoutedConfig.model_validate(
        {
            **wide.model_dump(exclude={"kind"}),
            "kind": "routed",
            "route": "expert",
            "experts": options.experts,
            "tiles": config.core.kv_heads,
            "shared": 0,
            "top_k": options.experts,
            "order": tuple(range(wide.core.kv_heads)),
        }
    )
