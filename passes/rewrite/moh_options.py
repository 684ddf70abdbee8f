"""Options of `to: moh`, and the numbers of heads they come to in one block."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from reattend.mixers.config import CoreConfig, Frozen
from reattend.passes.base import Refusal

#: A whole number counts units (query heads, or KV groups), a fraction is a share.
Count = Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, le=1)]
PerLayer = Count | tuple[Count, ...]
Score = Literal["output-norm", "input-norm", "first-order", "leave-one-out"]

#: options that may be lists
LISTED = ("shared", "routed", "top_k")


class MohOptions(Frozen):
    """Which heads a token uses.

    Attributes:
        shared: heads that every token uses: a count, or a share of all (rounded up; with
            `route: head` to whole KV groups), or a list with one of these per layer of the stack.
        routed: the others, likewise; None: all that are not shared.
        top_k: routed heads that each token uses: a count, or a share of the routed (rounded up),
            or a list; None: all of them; `auto`: in every layer as many as cost the model's output
            least, for `active` over all layers of the rule (`passes/rewrite/moh_budget.py`).
        active: most that a token uses of all heads, a share, shared ones included; with `auto`.
        route: what is chosen: whole `kv-group`s, so that a group that nobody chose is not read, or
            every query `head` by itself.
        router: `linear` in the block's input, from zero, or `qnorm`, the norms of the queries,
            without parameters.
        router_start: `zero`, where units rank by their number, or `output-norm`, where they rank by
            the size of what they add to the block's output, as far as its input tells
            (`passes/rewrite/router_fit.py`); the second needs `gate: hard`.
        gate: `weighted`, heads count by the router's softmax, or `hard`, by 0 or 1.
        select_shared: the most important KV groups, or the `first` ones.
        importance: how that is measured (`passes/rewrite/importance.py`).
        anneal: share of the training tokens over which all routed heads become `top_k`; 0: from the
            start.
        balance_loss: weight of the loss that spreads tokens evenly over routed heads.
        order: KV groups by importance, where they have been measured; not for plans.
    """

    shared: PerLayer = 0.25
    routed: PerLayer | None = None
    top_k: PerLayer | Literal["auto"] | None = None
    active: float | None = Field(default=None, gt=0, le=1)
    route: Literal["kv-group", "head"] = "kv-group"
    router: Literal["linear", "qnorm"] = "linear"
    router_start: Literal["zero", "output-norm"] = "zero"
    gate: Literal["weighted", "hard"] = "weighted"
    select_shared: Literal["importance", "first"] = "importance"
    importance: Score = "output-norm"
    anneal: float = Field(default=0.4, ge=0, le=1)
    balance_loss: float = Field(default=0.01, ge=0)
    order: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _starts_exactly(self) -> MohOptions:
        if self.router == "qnorm" and self.gate == "weighted":
            raise ValueError(
                "router: qnorm has no weights that could start at zero, so weighted gates would "
                "change the block from the start; use gate: hard"
            )
        if (self.active is None) == (self.top_k == "auto"):
            raise ValueError(
                "top_k: auto and active go together: active is the share of all heads that it "
                "spreads over the layers"
            )
        if self.router_start != "zero" and (self.router == "qnorm" or self.gate == "weighted"):
            raise ValueError(
                "router_start: output-norm is of a linear router, and its scores would change "
                "weighted gates from the start; use router: linear with gate: hard"
            )
        return self


class Heads(NamedTuple):
    """Units of one block: all, those every token uses, and how many of the others it uses."""

    units: int
    shared: int
    top_k: int

    @property
    def routed(self) -> int:
        """Units that a token may leave out."""
        return self.units - self.shared


def resolve(core: CoreConfig, options: MohOptions) -> Heads | Refusal:
    """What the options come to in one block, or why they do not fit it."""
    by_head = options.route == "head"
    units, step = (core.heads, core.heads // core.kv_heads) if by_head else (core.kv_heads, 1)
    what = "query heads" if by_head else "KV groups"
    shared = count(options.shared, units, step)
    routed = units - shared if options.routed is None else count(options.routed, units, step)
    if shared + routed != units:
        return Refusal(
            f"{shared} shared and {routed} routed {what} are {shared + routed}, and the block has "
            f"{units}; leave `routed` out, or make them {units} together"
        )
    if shared % step:
        return Refusal(
            f"{shared} shared query heads are not whole KV groups: {step} query heads read each, "
            f"and keys and values that a shared head reads are always read; use {step}, "
            f"{2 * step} ..., or route: kv-group"
        )
    if not routed and isinstance(options.shared, float) and options.shared < 1:
        return Refusal(
            f"shared: {options.shared} of {units} {what} is all of them, so there is nothing to "
            "choose; " + ("use a smaller count" if by_head else "use route: head")
        )
    if options.top_k == "auto":
        assert options.active is not None
        return share_of(Heads(units, shared, routed), options.active)
    top_k = routed if options.top_k is None else count(options.top_k, routed, 1)
    if top_k > routed:
        return Refusal(
            f"top_k {top_k} is larger than the {routed} routed {what} ({units} less {shared} "
            "shared)"
        )
    if isinstance(options.top_k, float) and options.top_k < 1 and top_k == routed:
        return Refusal(
            f"top_k: {options.top_k} of {routed} routed {what} is all of them, so nothing would be "
            "left out; " + ("give a count" if by_head else "use route: head, or give counts")
        )
    if routed and not top_k:
        return Refusal(
            f"top_k 0: no token would ever use the {routed} routed {what}, so they should be "
            "pruned, not routed"
        )
    return Heads(units, shared, top_k)


def share_of(heads: Heads, active: float) -> Heads | Refusal:
    """A block that uses just the share that all layers use together."""
    used = int(active * heads.units + 1e-9)
    if used <= heads.shared:
        return Refusal(
            f"active: {active} of {heads.units} heads or groups is {used}, and {heads.shared} are "
            "shared: none would be chosen; raise active, or share fewer"
        )
    return heads._replace(top_k=used - heads.shared)


def count(given: PerLayer, whole: int, step: int) -> int:
    """A count as it is; a share in units, rounded up to a multiple of `step`."""
    assert not isinstance(given, tuple)  # `for_layer` has taken the layer's own
    if isinstance(given, int):
        return given
    return step * ceil(given * whole / step - 1e-9)
