"""Several conversions in one block, each for some of its KV groups: a plan's `heads`.

No plan names this conversion; `reattend.preflight` makes it where the rules that take a site give
its KV groups to different conversions. Each part is built as a block of its own
(`reattend.parts`), and `MixedAttention` holds the results around the block's own o_proj.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, SerializeAsAny, model_serializer

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.mixed import GroupConfig, MixedAttention, MixedConfig
from reattend.parts import part, part_config, why_whole
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, Exactness
from reattend.passes.rewrite.registry import conversion
from reattend.statistics import Need, SiteStatistics

#: from best to worst
_ORDER: tuple[Exactness, ...] = ("exact", "bounded", "learned")


class PartOptions(Frozen):
    """What some KV groups become: a conversion's name and its options."""

    heads: tuple[int, ...]
    to: str
    options: SerializeAsAny[BaseModel]

    @model_serializer
    def _as_a_rule(self) -> dict[str, Any]:
        """As a plan's rule writes it."""
        given = self.options.model_dump(mode="json", exclude_unset=True)
        return {"heads": list(self.heads), "to": self.to, **given}


class MixedOptions(Frozen):
    """The parts; together they hold every KV group of the block once."""

    groups: tuple[PartOptions, ...]


class Mixed(Conversion):
    """Each part by its own conversion."""

    name = "mixed"
    Options = MixedOptions

    def wants(self, config: DenseConfig, options: MixedOptions) -> frozenset[Need]:
        """What any part wants."""
        parts = ((conversion(p.to)(), part_config(config, p.heads), p) for p in options.groups)
        return frozenset().union(*(made.wants(own, p.options) for made, own, p in parts))

    def check(self, config: DenseConfig, options: MixedOptions) -> Refusal | None:
        """A part's refusal names its heads."""
        tied = why_whole(config)
        if tied is not None:
            return Refusal(f"`heads` cannot divide this block: {tied}")
        reasons = []
        for p in options.groups:
            made = conversion(p.to)()
            refusal = made.check(part_config(config, p.heads), p.options)
            if refusal is None and made.undecided(p.options):
                refusal = Refusal("auto sizes are chosen for whole blocks; give numbers for heads")
            if refusal is not None:
                reasons.append(f"heads {list(p.heads)} (to: {p.to}): {refusal.reason}")
        return Refusal("; ".join(reasons)) if reasons else None

    def check_within(
        self, config: DenseConfig, options: MixedOptions, longest: int
    ) -> Refusal | None:
        """As `check`."""
        return _first(config, options, lambda made, *part: made.check_within(*part, longest))

    def check_tokens(
        self, config: DenseConfig, options: MixedOptions, tokens: int
    ) -> Refusal | None:
        """As `check`."""
        return _first(config, options, lambda made, *part: made.check_tokens(*part, tokens))

    def exact_setting(self, config: DenseConfig) -> MixedOptions:
        """One part, unchanged."""
        dense = conversion("dense")()
        heads = tuple(range(config.core.kv_heads))
        kept = PartOptions(heads=heads, to=dense.name, options=dense.exact_setting(config))
        return MixedOptions(groups=(kept,))

    def cost(self, config: DenseConfig, options: MixedOptions) -> Cost:
        """The parts' sums and the projection."""
        costs = [
            conversion(p.to)().cost(part_config(config, p.heads), p.options) for p in options.groups
        ]
        core, features = config.core, config.out_features or 0
        out = core.heads * core.v_head_dim * features + features * config.out_bias
        return Cost(
            sum(c.cache for c in costs),
            sum(c.parameters for c in costs) + out,
            sum(c.flops_per_token for c in costs) + 2 * out,
            costs[0].context,
            sum(c.kept for c in costs) + out,
        )

    def training(
        self, config: DenseConfig, options: MixedOptions, length: int
    ) -> tuple[float, float]:
        """The parts' sum, and the largest."""
        each = [
            conversion(p.to)().training(part_config(config, p.heads), p.options, length)
            for p in options.groups
        ]
        return sum(work for work, _ in each), max(held for _, held in each)

    def build(
        self, dense: DenseAttention, statistics: SiteStatistics | None, options: MixedOptions
    ) -> Built:
        """Slice weights and moments, build every part, keep o_proj."""
        core, built, groups, evidence = dense.config.core, [], [], []
        for p in options.groups:
            moments = None if statistics is None else statistics.part(core, p.heads)
            made = conversion(p.to)().build(part(dense, p.heads), moments, p.options)
            built.append(made)
            groups.append(GroupConfig(kv_heads=p.heads, **made.mixer.described()))
            evidence.append(
                {
                    "heads": list(p.heads),
                    "to": p.to,
                    "exactness": made.exactness,
                    "cache": made.mixer.cache_per_token,
                    "evidence": made.evidence,
                }
            )
        config = MixedConfig(
            groups=tuple(groups),
            out_features=dense.config.out_features,
            out_bias=dense.config.out_bias,
        )
        with torch.device("meta"):
            mixer = MixedAttention(config, [made.mixer for made in built])
        mixer.o_proj = dense.o_proj
        worst = max((made.exactness for made in built), key=_ORDER.index)
        return Built(mixer.eval(), worst, {"groups": evidence})


def _first(
    config: DenseConfig, options: MixedOptions, ask: Callable[..., Refusal | None]
) -> Refusal | None:
    """The first part that is refused, with its heads."""
    for p in options.groups:
        refusal = ask(conversion(p.to)(), part_config(config, p.heads), p.options)
        if refusal is not None:
            return Refusal(f"heads {list(p.heads)} (to: {p.to}): {refusal.reason}")
    return None
