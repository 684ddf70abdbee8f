"""`to: moh`: Mixture-of-Heads, every token uses the shared heads and the best of the others.

Jin et al., arXiv 2410.11842. The block keeps its weights; KV groups are put in order of importance,
so that shared heads come first (a permutation, exact), and a router is added. It starts at zero,
where heads weigh exactly 1 and rank by importance, or fitted to what heads add to the output. With
`top_k` all, the default, the block is the original; with less it leaves out the least important, of
all tokens or of each, until it has been trained. The formulas with the symbols used here:
docs/math/moh.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.routed import RoutedAttention
from reattend.mixers.routed_config import RoutedConfig
from reattend.parts import reordered
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Cost, Measure, Subject, dense_cost, regrouped
from reattend.passes.rewrite.moh_budget import spread, tried
from reattend.passes.rewrite.moh_options import LISTED, Heads, MohOptions, resolve
from reattend.passes.rewrite.per_layer import at_layer
from reattend.passes.rewrite.ranking import Ranking
from reattend.passes.rewrite.router_fit import fitted
from reattend.passes.rewrite.sparse_build import like
from reattend.statistics import Need


class ToMoh(Ranking):
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
        if options.router_start != "zero" and (unread := self.unread(config)) is not None:
            return Refusal(f"router_start: {options.router_start}: {unread}; use zero")
        why = self.unranked(config, options) if self.measures(options) else None
        if why is None:
            return None
        return Refusal(f"heads cannot be ordered by importance: {why}; set select_shared: first")

    def for_layer(self, options: MohOptions, layer: int, layers: int) -> MohOptions | Refusal:
        """One entry of every per-layer list."""
        chosen = at_layer(options, LISTED, layer, layers)
        return Refusal(chosen) if isinstance(chosen, str) else chosen

    def measures(self, options: MohOptions) -> bool:
        """Unless the first ones are shared."""
        return options.select_shared == "importance"

    def units(self, config: DenseConfig, options: MohOptions) -> int:
        """KV groups are ordered, whatever is routed."""
        return config.core.kv_heads

    def undecided(self, options: MohOptions) -> bool:
        """Whether the model is asked which heads matter, or in which layers."""
        return options.top_k == "auto" or super().undecided(options)

    def together(self, options: MohOptions) -> str:
        """Layers share one budget whatever each of them shares."""
        return options.model_copy(update={"shared": 0, "routed": None}).model_dump_json()

    def trials(self, configs: Sequence[DenseConfig], options: MohOptions) -> int:
        """One per unit whose importance is asked for, and one per count of `top_k: auto`."""
        asked = super().trials(configs, options) if super().undecided(options) else 0
        if options.top_k == "auto":
            each = [resolve(config.core, options) for config in configs]
            asked += sum(len(tried(heads)) for heads in each if isinstance(heads, Heads))
        return asked

    def rehearsal(self, batch: dict[str, Any], options: MohOptions) -> dict[str, Any]:
        """Text as it is, unless single heads are ranked."""
        return super().rehearsal(batch, options) if super().undecided(options) else batch

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """The order of every site's groups, and how many heads it uses."""
        given = sites[0].options
        chosen = [s.options for s in sites]
        if super().undecided(given):
            chosen = super().allocate(sites, measure)
        if given.top_k != "auto":
            return chosen
        mixers = []
        for site, options in zip(sites, chosen, strict=True):
            whole = options.model_copy(update={"top_k": None, "active": None})
            mixer = self.build(site.dense, site.statistics, whole).mixer
            assert isinstance(mixer, RoutedAttention)
            mixers.append((site.path, mixer))
        counts = spread(mixers, given, measure)
        return [
            options.model_copy(update={"top_k": k, "active": None})
            for options, k in zip(chosen, counts, strict=True)
        ]

    def wants(self, config: DenseConfig, options: MohOptions) -> frozenset[Need]:
        """Rows of the block's input, for the order of heads and for the router."""
        more: set[Need] = {"gram"} if options.top_k == "auto" else set()
        if options.router_start != "zero":
            more |= {"gram", "sample"}
        return super().wants(config, options) | more

    def outcome(self, config: DenseConfig, options: MohOptions) -> RoutedConfig | None:
        """The mixer's description; which group is where does not show in it but by `order`."""
        return None if options.top_k == "auto" else self.unordered(config, options)

    def unordered(self, config: DenseConfig, options: MohOptions) -> RoutedConfig:
        """The description, with groups where they are; of a mean block before it is measured."""
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
        before, core, made = dense_cost(config), config.core, self.unordered(config, options)
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
        """The same weights in another order, and a router at its start."""
        order = self.order(dense, statistics, options)
        if order != tuple(range(len(order))):
            dense = reordered(dense, order)
        config = self.described(dense.config, options, order)
        mixer = like(dense, RoutedAttention)
        mixer.begin(config)
        if options.router_start != "zero" and mixer.router.routed is not None:
            mixer.router.routed.weight.data = fitted(
                dense, statistics.samples, config.units, config.shared
            )
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
