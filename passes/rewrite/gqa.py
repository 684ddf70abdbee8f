"""`to: gqa`: several key/value heads become one, grouped-query attention.

Query heads stay; the ones that read heads which become one read that one. Ainslie et al. (arXiv
2305.13245) take the mean of the heads' projections. Here heads are brought together first: keys by
what commutes with the rotation, values by what the output projection can undo, and those are
merged that lose least together (`gqa_solve`, `gqa_groups`). What is left is an ordinary block with
a smaller cache. Exact with as many KV heads as before, or where the heads were turned copies of
each other. Derivation: docs/math/heads.md.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from reattend.attention_moments import read_out
from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.parts import holding, reordered, why_whole
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, dense_cost
from reattend.passes.rewrite.gqa_groups import neighbours, similar
from reattend.passes.rewrite.gqa_solve import Merge, Method, merge, merge_keys
from reattend.passes.rewrite.mla_moments import key_moment, with_bias
from reattend.passes.rewrite.moh_options import PerLayer, count
from reattend.passes.rewrite.per_layer import at_layer
from reattend.statistics import Need, SiteStatistics

NO_DATA = "keys: mean, values: mean and group: neighbours need no measurement"


class GqaOptions(Frozen):
    """How many key/value heads are left, and how they are made.

    Attributes:
        num_key_value_heads: a count, a share of those there are (rounded up), or a list with one of
            these per layer of the stack.
        group: heads that become one: those that lose least together, or `neighbours`.
        keys, values: how: `joint`, the least error of scores and of the output; `procrustes`, the
            mean of heads turned towards each other; `mean`, as they are.
    """

    num_key_value_heads: PerLayer = 0.5
    group: Literal["similar", "neighbours"] = "similar"
    keys: Method = "joint"
    values: Method = "joint"


class ToGqa(Conversion):
    """Multi-head or grouped-query attention to grouped-query attention with fewer KV heads."""

    name = "gqa"
    Options = GqaOptions

    def check(self, config: DenseConfig, options: GqaOptions) -> Refusal | None:
        """Reads no weight."""
        before, left = config.core.kv_heads, self.left(config, options)
        if not 0 < left <= before or before % left:
            fitting = [n for n in range(1, before + 1) if before % n == 0]
            return Refusal(
                f"num_key_value_heads {left}: {before} KV heads cannot become that many, equally "
                f"many in each; use {', '.join(map(str, fitting))}"
            )
        share = options.num_key_value_heads
        if isinstance(share, float) and share < 1 and left == before:
            return Refusal(
                f"num_key_value_heads: {share} of {before} KV heads is all of them, so nothing "
                "would be merged"
            )
        if left == before:
            return None
        if (tied := why_whole(config)) is not None:
            return Refusal(f"KV heads cannot be merged: {tied}")
        if (why := _unturnable(config, options)) is not None:
            return Refusal(why)
        if not self.measures(options):
            return None
        if config.cross:
            return Refusal(
                "heads are measured on the block's own input, and its keys come from another; "
                + NO_DATA
            )
        if config.core.pattern == "opaque":
            return Refusal(
                "the mask is the model's own, and how heads are read is measured without the "
                f"model; {NO_DATA}"
            )
        return None

    def measures(self, options: GqaOptions) -> bool:
        """Whether what heads make is looked at."""
        return options.group == "similar" or (options.keys, options.values) != ("mean", "mean")

    def wants(self, config: DenseConfig, options: GqaOptions) -> frozenset[Need]:
        """Moments weighted by what errors cost, unless nothing is chosen by them."""
        if self.left(config, options) == config.core.kv_heads or not self.measures(options):
            return frozenset()
        return frozenset({"gram", "attention"})

    def for_layer(self, options: GqaOptions, layer: int, layers: int) -> GqaOptions | Refusal:
        """One entry of a per-layer list."""
        chosen = at_layer(options, ("num_key_value_heads",), layer, layers)
        return Refusal(chosen) if isinstance(chosen, str) else chosen

    def left(self, config: DenseConfig, options: GqaOptions) -> int:
        """KV heads of the result."""
        return count(options.num_key_value_heads, config.core.kv_heads, 1)

    def outcome(self, config: DenseConfig, options: GqaOptions) -> DenseConfig:
        """The same block with fewer KV heads; ALiBi's slopes may come in another order."""
        core = config.core.model_copy(update={"kv_heads": self.left(config, options)})
        return config.model_copy(update={"core": core})

    def exact_setting(self, config: DenseConfig) -> GqaOptions:
        """As many as there are."""
        return GqaOptions(num_key_value_heads=config.core.kv_heads)

    def cost(self, config: DenseConfig, options: GqaOptions) -> Cost:
        """That of the smaller block."""
        return dense_cost(self.outcome(config, options))

    def build(
        self, dense: DenseAttention, statistics: SiteStatistics | None, options: GqaOptions
    ) -> Built:
        """Rows of keys and values are combined, queries and the output projection take over."""
        before, left = dense.config.core.kv_heads, self.left(dense.config, options)
        if left == before:
            return Built(dense, "exact", {"num_key_value_heads": f"{left} of {before}"})
        measured = None
        if self.measures(options):
            assert statistics is not None
            measured = Measured(dense, statistics, options)
        groups = neighbours(before, left)
        if options.group == "similar" and measured is not None:
            groups = similar(measured.pair_costs(), left)
        mixer, told = _merged(dense, groups, measured)
        told = {
            "num_key_value_heads": f"{left} of {before}",
            "merged": ", ".join("+".join(map(str, group)) for group in groups),
            **told,
        }
        return Built(mixer, "learned", told)


def _unturnable(config: DenseConfig, options: GqaOptions) -> str | None:
    """Why heads cannot be turned before they are merged, or None."""
    for name, stream in (("queries", config.q), ("keys", config.k)):
        if stream.norm is not None and options.keys != "mean":
            return (
                f"{name} are normalised, and a turn before a norm is none behind it; use keys: mean"
            )
    if config.out_features is None and options.group == "similar":
        return (
            "no output projection here could follow another order of heads; use group: neighbours"
        )
    if options.values == "mean":
        return None
    if config.v.norm is not None:
        return "values are normalised, and a turn before a norm is none behind it; use values: mean"
    if config.out_features is None:
        return "no output projection here could turn values back; use values: mean"
    if config.gate is not None and not config.gate.per_head:
        return "a gate weighs every dimension of a head, which values must keep; use values: mean"
    return None


class Measured:
    """What KV heads make of tokens, and what errors of it cost."""

    def __init__(
        self, dense: DenseAttention, statistics: SiteStatistics, options: GqaOptions
    ) -> None:
        assert statistics.attention is not None
        config, seen = dense.config, statistics.attention
        self.config, self.options = config, options
        groups, d, e = config.core.kv_heads, config.core.qk_head_dim, config.core.v_head_dim
        weight = seen.weight.clamp_min(1e-300)
        scale = (config.core.scale * config.k.scale) ** 2
        self.keys = key_moment(dense, statistics, weighted=True)
        self.key_cost = scale * (seen.queries / weight).reshape(groups, -1, d, d).sum(1)
        total = seen.total[groups * d :] / weight
        moment = seen.gram[groups * d :, groups * d :] / weight
        self.values = with_bias(moment, total, dense.v_proj.bias)
        self.value_cost = config.v.scale**2 * read_out(dense).reshape(groups, -1, e, e).sum(1)

    def of(self, group: list[int]) -> tuple[Merge, Merge]:
        """Keys and values of these heads as one."""
        core = self.config.core
        keys, values = (_rows(group, w) for w in (core.qk_head_dim, core.v_head_dim))
        return (
            merge_keys(
                self.config.rotary, self.keys[keys][:, keys], self.key_cost[group],
                self.options.keys,
            ),
            merge(self.values[values][:, values], self.value_cost[group], self.options.values),
        )  # fmt: skip

    def pair_costs(self) -> Tensor:
        """What every two heads lose as one, [G, G]."""
        heads = self.config.core.kv_heads
        found = torch.zeros(heads, heads, dtype=torch.float64)
        for a, b in combinations(range(heads), 2):
            found[a, b] = found[b, a] = sum(made.lost for made in self.of([a, b]))
        return found


def _rows(heads: list[int], width: int) -> Tensor:
    return torch.tensor([h * width + i for h in heads for i in range(width)])


def _pooled(heads: int, width: int) -> Merge:
    """The mean, of what was not measured."""
    eye = torch.eye(width, dtype=torch.float64)
    return Merge(eye.repeat(heads, 1, 1), eye.repeat(1, heads) / heads, 0.0, 0.0)


def _merged(
    dense: DenseAttention, groups: list[list[int]], measured: Measured | None
) -> tuple[DenseAttention, dict[str, Any]]:
    """The new block, and what was lost by merging."""
    core, each = dense.config.core, len(groups[0])
    order = [head for group in groups for head in group]
    moved = reordered(dense, order)
    config = moved.config.model_copy(
        update={"core": core.model_copy(update={"kv_heads": len(groups)})}
    )
    made = [
        (_pooled(each, core.qk_head_dim), _pooled(each, core.v_head_dim))
        if measured is None
        else measured.of(group)
        for group in groups
    ]
    keys, values = zip(*made, strict=True)
    state = moved.state_dict()
    per_kv = core.heads // core.kv_heads
    query = torch.cat([m.up.mT for m in keys]).repeat_interleave(per_kv, 0)
    read = torch.cat([m.up for m in values]).repeat_interleave(per_kv, 0)
    for name, down in (("k_proj", keys), ("v_proj", values)):
        for part in ("weight", "bias"):
            if f"{name}.{part}" in state:
                state[f"{name}.{part}"] = _apply(
                    torch.stack([m.down for m in down]), state[f"{name}.{part}"]
                )
    if measured is not None and measured.options.keys != "mean":
        for part in ("weight", "bias"):
            if f"q_proj.{part}" in state:
                state[f"q_proj.{part}"] = _apply(query, state[f"q_proj.{part}"])
    if measured is not None and measured.options.values != "mean":
        # columns of head h times U: the transposed rows, from the left by U^T
        columns = state["o_proj.weight"].t()
        state["o_proj.weight"] = _apply(read.mT, columns).t().contiguous()
    told: dict[str, Any] = {}
    for name, found in (("keys", keys), ("values", values)):
        whole = sum(m.whole for m in found)
        if whole > 0:
            told[f"{name}_lost"] = f"{sum(m.lost for m in found) / whole:.4f}"
    return holding(config, state), told


def _apply(maps: Tensor, rows: Tensor) -> Tensor:
    """Every map [n, out, in] on its own rows of a stack [n in, ...], in float64."""
    by_head = rows.detach().double().cpu().reshape(len(maps), maps.shape[2], -1)
    made = (maps @ by_head).flatten(0, 1).reshape(-1, *rows.shape[1:])
    return made.to(rows)
