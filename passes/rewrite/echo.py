"""`to: echo`: layers that attend alike attend once.

EchoAtt (arXiv 2409.14595): attention matrices of neighbouring layers are much alike, so some layers
reuse those of an earlier one with values of their own, and are distilled. Which ones is measured:
followers are the layers whose attention an earlier layer's resembles most, head matched with head.
Query and key projections of a follower go, and so do its keys in the cache. The first and the last
layer never follow. Exact without followers. Derivation: docs/math/heads.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

from pydantic import Field

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.echo import EchoAttention, EchoConfig
from reattend.parts import kept_heads, why_whole
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, Measure, Subject, dense_cost
from reattend.passes.rewrite.echo_maps import Likeness, likeness
from reattend.passes.rewrite.moh_options import Count
from reattend.passes.rewrite.sparse_build import like
from reattend.statistics import Need


class EchoOptions(Frozen):
    """How many layers follow.

    Attributes:
        followers: layers of the rule that follow: a count, or a share (rounded down).
        group, size, place: first of the rule's sites, how many they are, and which of them this is;
            not for plans.
        leader: site whose queries and keys a follower takes, once measured; not for plans.
        leads: blocks that follow this one, once measured; None: not measured yet; not for plans.
        groups, heads: a follower's KV groups and query heads in the order of those of its leader
            that they follow; not for plans.
        alike: how alike both attend, 0 to 1; not for plans.
    """

    followers: Count = 0.25
    group: str = ""
    size: int = Field(default=1, ge=1)
    place: int = Field(default=0, ge=0)
    leader: str = ""
    leads: int | None = None
    groups: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    alike: float = 0.0


class ToEcho(Conversion):
    """Blocks of one rule, of which some follow others of the same sizes and pattern."""

    name = "echo"
    Options = EchoOptions
    joins = True

    def check(self, config: DenseConfig, options: EchoOptions) -> Refusal | None:
        """Reads no weight."""
        if options.followers == 0:
            return None
        why = why_whole(config)
        if why is None and config.cross:
            why = "its keys come from another stream"
        if why is None and config.core.pattern == "opaque":
            why = "how it attends is measured in the model, and its mask is the model's own"
        if why is None and config.out_features is None:
            why = "it has no output projection of its own that could follow its leader's heads"
        return None if why is None else Refusal(f"it cannot follow or lead: {why}")

    def join(self, members: Sequence[tuple[str, DenseConfig, Any]]) -> list[Any]:
        """Who is in; a refusal where fewer layers can follow than are asked for."""
        size = len(members)
        wanted = followers(members[0][2], size)
        possible = able([config for _, config, _ in members])
        share = members[0][2].followers
        if wanted == 0 and share != 0:
            return [Refusal(f"followers: {share} of {size} layers is none") for _ in members]
        if wanted > len(possible):
            return [
                Refusal(
                    f"followers: {wanted}, and of these {size} layers {len(possible)} can "
                    "follow an earlier one of the same heads, widths and pattern; the first and "
                    "the last stay as they are"
                )
                for _ in members
            ]  # fmt: skip
        return [
            options.model_copy(update={"group": members[0][0], "size": size, "place": place})
            for place, (_, _, options) in enumerate(members)
        ]

    def wants(self, config: DenseConfig, options: EchoOptions) -> frozenset[Need]:
        """Calibration rows, which who follows is measured on."""
        return frozenset({"gram"}) if self.undecided(options) else frozenset()

    def undecided(self, options: EchoOptions) -> bool:
        """Whether there are followers to choose."""
        return followers(options, options.size) > 0 and options.leads is None

    def together(self, options: EchoOptions) -> str:
        """All sites of the rule."""
        return f"{options.group} {options.followers}"

    def trials(self, configs: Sequence[DenseConfig], options: EchoOptions) -> int:
        """One pass over a few rows, without gradients."""
        return 5

    def solves(self, options: EchoOptions) -> int:
        """Nothing is solved for."""
        return 0

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """Who follows whom."""
        options = sites[0].options
        found = likeness(sites, measure)
        chosen = choose([s.dense.config for s in sites], found, followers(options, len(sites)))
        leads = [leader for leader, _ in chosen.values()]
        made = []
        for place, site in enumerate(sites):
            update: dict[str, Any] = {"leads": leads.count(place)}
            if place in chosen:
                leader, match = chosen[place]
                update |= {
                    "leader": sites[leader].path, "groups": match.groups, "heads": match.heads,
                    "alike": match.alike,
                }  # fmt: skip
            made.append(site.options.model_copy(update=update))
        return made

    def outcome(self, config: DenseConfig, options: EchoOptions) -> Frozen | None:
        """The mixer's description; None until who follows is measured."""
        if self.undecided(options):
            return None
        if not options.leader and not options.leads:
            return config
        return described(config, options)

    def exact_setting(self, config: DenseConfig) -> EchoOptions:
        """Nobody follows."""
        return EchoOptions(followers=0)

    def cost(self, config: DenseConfig, options: EchoOptions) -> Cost:
        """A follower's; until they are measured, those after the first count as followers."""
        plain = dense_cost(config)
        follows = bool(options.leader)
        if self.undecided(options):
            follows = 0 < options.place <= followers(options, options.size)
        if not follows:
            return plain
        core = config.core
        rows = (core.heads + core.kv_heads) * core.qk_head_dim
        biases = core.heads * core.qk_head_dim * config.q.bias
        biases += core.kv_heads * core.qk_head_dim * config.k.bias
        gone = rows * config.hidden_size + biases
        return Cost(
            core.kv_heads * core.v_head_dim, plain.parameters - gone,
            plain.flops_per_token - 2 * gone, plain.context,
        )  # fmt: skip

    def build(self, dense: DenseAttention, statistics: Any, options: EchoOptions) -> Built:
        """The block as it is, one that hands on, or one that follows."""
        if options.leader:
            moved = kept_heads(dense, options.groups, options.heads)
            mixer = like(moved, EchoAttention)
            mixer.begin(described(moved.config, options))
            told = {"follows": options.leader, "alike": f"{options.alike:.3f}"}
            return Built(mixer, "learned", told)
        if not options.leads:
            return Built(dense, "exact", {})
        mixer = like(dense, EchoAttention)
        mixer.begin(described(dense.config, options))
        return Built(mixer, "exact", {"leads": options.leads})


def followers(options: EchoOptions, layers: int) -> int:
    """How many of so many layers follow."""
    share = options.followers
    return floor(share * layers + 1e-9) if isinstance(share, float) else share


def described(config: DenseConfig, options: EchoOptions) -> EchoConfig:
    """The mixer's description."""
    return EchoConfig.model_validate(
        {
            **config.model_dump(exclude={"kind"}),
            "leader": options.leader,
            "followers": options.leads or 0,
        }
    )


def unlike(follower: DenseConfig, leader: DenseConfig) -> str | None:
    """Why one block cannot attend where another did, or None."""
    one, other = follower.core, leader.core
    same = ("heads", "kv_heads", "qk_head_dim", "pattern", "window", "chunk", "scale", "softcap")
    for word in same:
        if getattr(one, word) != getattr(other, word):
            return word
    return None


def able(configs: Sequence[DenseConfig]) -> list[int]:
    """Blocks that can follow an earlier one: none of the first of a kind, nor the last block."""
    return [
        i for i in range(1, len(configs) - 1)
        if any(unlike(configs[i], configs[j]) is None for j in range(i))
    ]  # fmt: skip


def choose(
    configs: Sequence[DenseConfig], found: Likeness, wanted: int
) -> dict[int, tuple[int, Any]]:
    """Of every follower its leader, and how their heads are matched.

    The most alike pair of a layer and the nearest one before it that does not follow comes first;
    who leads does not follow later, and neither do the first and the last layer. A pair is passed
    over where its leader would be missing among the followers wanted.

    Args:
        configs: the blocks, in the order of the model.
        found: how alike two of them attend.
        wanted: how many follow; no more than `able`.
    """
    chosen: dict[int, tuple[int, Any]] = {}
    while len(chosen) < wanted:
        leading = {leader for leader, _ in chosen.values()}
        free = [place for place in able(configs) if place not in chosen and place not in leading]
        pairs = []
        for place in free:
            before = (j for j in reversed(range(place)) if j not in chosen)
            leader = next(j for j in before if unlike(configs[place], configs[j]) is None)
            if len(free) - len({place, leader}.intersection(free)) < wanted - len(chosen) - 1:
                continue
            match = found(leader, place)
            pairs.append((match.alike, -place, leader, match))
        _, place, leader, match = max(pairs, key=lambda pair: pair[:2])
        chosen[-place] = (leader, match)
    return chosen
