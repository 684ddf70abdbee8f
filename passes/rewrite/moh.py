"""`to: moh`: Mixture-of-Heads, every token uses the shared heads and the best of the others.

Jin et al., arXiv 2410.11842. The block keeps its weights; KV groups are put in order of importance,
so that shared heads come first (a permutation, exact), and a router is added. The router starts at
zero, where heads weigh exactly 1 and rank by importance: with `top_k` all, the default, the block
is the original; with less it leaves out the least important until it has been trained. The formulas
with the symbols used here: docs/math/moh.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.routed import RoutedAttention
from reattend.mixers.routed_config import RoutedConfig
from reattend.parts import reordered, why_whole
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import (
    TRAINING_TRIALS,
    Built,
    Conversion,
    Cost,
    Measure,
    Subject,
    dense_cost,
    regrouped,
)
from reattend.passes.rewrite.importance import LOCAL, ROWS, first_order, leave_one_out, ranked
from reattend.passes.rewrite.moh_options import MohOptions, resolve
from reattend.passes.rewrite.repeats import repeated
from reattend.passes.rewrite.sparse_build import like
from reattend.statistics import Need


class ToMoh(Conversion):
    """Any block to Mixture-of-Heads."""

    name = "moh"
    Options = MohOptions

    def check(self, config: DenseConfig, options: MohOptions) -> Refusal | None:
        """Reads no weight."""
        if (moved := regrouped(config)) is not None:
            return moved
        heads = resolve(config.core, options)
        if isinstance(heads, Refusal):
            return heads
        if options.select_shared == "first":
            return None
        why = why_whole(config)
        if why is None and config.cross:
            why = "importance is measured on the block's own input, and its keys come from another"
        if why is None and config.core.pattern == "opaque":
            why = "importance is measured without the model, and the mask is the model's own"
        if why is None and options.importance == "output-norm" and config.out_features is None:
            why = "the block has no output projection of its own to measure importance behind"
        if why is None:
            return None
        return Refusal(f"heads cannot be ordered by importance: {why}; set select_shared: first")

    def for_layer(self, options: MohOptions, layer: int, layers: int) -> MohOptions | Refusal:
        """One entry of every per-layer list."""
        chosen = options.at_layer(layer, layers)
        return Refusal(chosen) if isinstance(chosen, str) else chosen

    def wants(self, config: DenseConfig, options: MohOptions) -> frozenset[Need]:
        """Rows of the block's input, where heads are measured."""
        measures = options.select_shared == "importance" and not options.order
        return frozenset({"gram", "sample"}) if measures else frozenset()

    def undecided(self, options: MohOptions) -> bool:
        """Whether the whole model is asked which heads matter."""
        by_model = options.importance not in LOCAL
        return options.select_shared == "importance" and by_model and not options.order

    def learns(self, options: MohOptions) -> bool:
        """Gates of all heads, for their gradients."""
        return options.importance == "first-order" and self.undecided(options)

    def trials(self, configs: Sequence[DenseConfig], options: MohOptions) -> int:
        """One per KV group, or gradients on a few rows."""
        if options.importance == "first-order":
            return ROWS * TRAINING_TRIALS
        return sum(config.core.kv_heads for config in configs)

    def rehearsal(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Text that repeats itself: heads that look things up show it."""
        return repeated(batch)

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """The order of every site's KV groups."""
        score = leave_one_out
        if sites[0].options.importance == "first-order":
            score = first_order
        scores = score(sites, measure)
        return [
            s.options.model_copy(
                update={"order": ranked(scores[s.path], s.dense.config.core.kv_heads)}
            )
            for s in sites
        ]

    def outcome(self, config: DenseConfig, options: MohOptions) -> RoutedConfig:
        """The mixer's description; which group is where does not show in it but by `order`."""
        return self.described(config, options, options.order or tuple(range(config.core.kv_heads)))

    def described(
        self, config: DenseConfig, options: MohOptions, order: tuple[int, ...]
    ) -> RoutedConfig:
        """The mixer's description, of a block that is in order already."""
        heads = resolve(config.core, options)
        assert not isinstance(heads, Refusal)
        return RoutedConfig.model_validate(
            {
                **config.model_dump(exclude={"kind"}),
                "kind": "routed",
                "route": options.route,
                "shared": heads.shared,
                "top_k": heads.top_k,
                "router": options.router,
                "gate_by": options.gate,
                "order": order,
                "anneal": options.anneal,
                "balance_loss": options.balance_loss,
            }
        )

    def exact_setting(self, config: DenseConfig) -> MohOptions:
        """Nothing is left out and nothing is moved."""
        return MohOptions(shared=0, select_shared="first")

    def cost(self, config: DenseConfig, options: MohOptions) -> Cost:
        """Keys and values of all groups are cached; scores and sums are of the heads used."""
        before, core, made = dense_cost(config), config.core, self.outcome(config, options)
        router, each = router_size(made), core.heads * (core.qk_head_dim + core.v_head_dim)
        spared = round(each * before.context * (1 - made.active))
        return Cost(
            before.cache,
            before.parameters + router,
            before.flops_per_token + 2 * (router - spared),
            before.context,
            before.parameters if options.select_shared == "first" else 0,
        )

    def build(self, dense: DenseAttention, statistics: Any, options: MohOptions) -> Built:
        """The same weights in another order, and a router of zeros."""
        groups = dense.config.core.kv_heads
        order = options.order or tuple(range(groups))
        if self.wants(dense.config, options):
            order = ranked(LOCAL[options.importance](dense, statistics.samples), groups)
        if order != tuple(range(groups)):
            dense = reordered(dense, order)
        config = self.described(dense.config, options, order)
        mixer = like(dense, RoutedAttention)
        mixer.begin(config)
        mixer.router.to(next(dense.parameters())).train(dense.training)
        exact = config.top_k == config.routed
        return Built(mixer, "exact" if exact else "learned", stated(config))


def router_size(config: RoutedConfig) -> int:
    """Parameters of the router."""
    rows = config.routed if config.router == "linear" else 0
    if config.gate_by == "weighted":
        rows += config.shared + (2 if config.shared and config.routed else 0)
    return rows * config.hidden_size


def stated(config: RoutedConfig) -> dict[str, Any]:
    """For the report: what a token uses, and which KV groups, by their number in the original, are
    read for it.
    """
    per_group = config.core.heads // config.core.kv_heads
    always = config.shared if config.route == "kv-group" else config.shared // per_group
    others = len(config.order) - always
    told: dict[str, Any] = {
        "route": config.route,
        "router": f"{config.router}, {config.gate_by}",
        "shared": config.shared,
        "top_k": f"{config.top_k} of {config.routed}",
        "heads_used": f"{config.active:.3f}",
        "kv_groups_always_read": ", ".join(map(str, sorted(config.order[:always]))) or "none",
    }
    if others:
        told["kv_groups_read"] = f"{always + reads(config, others):.4g} of {len(config.order)}"
    return told


def reads(config: RoutedConfig, others: int) -> float:
    """Of the groups with no shared head, how many a token reads; on average over equally likely
    choices where query heads are routed.
    """
    if config.route == "kv-group":
        return config.top_k
    per_group = config.core.heads // config.core.kv_heads
    none = comb(config.routed - per_group, config.top_k) / comb(config.routed, config.top_k)
    return others * (1 - none)
