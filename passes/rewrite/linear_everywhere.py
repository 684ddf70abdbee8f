"""Options of `to: linear` beside window and decay, most of them for blocks that see all tokens."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from reattend.mixers.config import Frozen
from reattend.mixers.everywhere_config import PARTS, EverywhereConfig
from reattend.mixers.linear_config import LinearConfig

#: what blocks may have in which tokens see the past only
CAUSAL = ("flow", "sparse_top")
#: why others may not
WHY = {
    "lowrank": ": what is estimated of the keys that a query reads exactly has to be taken out of "
    "its sum, and nothing here sums estimates over blocks that single queries chose",
    "estimate": ": columns are shares of the whole text, so what a query reads would change with "
    "every later token",
}
#: maps whose features may be negative
_SIGNED = ("identity", "silu")


class EverywhereOptions(Frozen):
    """For `direction: bidirectional`; `flow` and `sparse_top` alone for causal blocks too.

    Attributes:
        mlp_width: of `feature_map: mlp` (LinFusion): inner width of the two maps that change what
            queries and keys are projected from; None: the block's own width.
        flow: weights are flows, conserved at queries and at keys (Flowformer).
        sparse_top: this share of the key blocks is attended to by softmax, for every block of
            queries the best by pooled scores; the sum over all keys is added through a projection
            that starts at zero (SLA). 1: exact. In causal blocks every query chooses by itself
            among the blocks before its own, which it reads as far as it goes, and which counts.
        sparse_block: tokens of a block.
        lowrank: with `sparse_top` and `feature_map: performer`: keys of other blocks have estimated
            softmax weights, in one sum with the exact ones (Scatterbrain).
        estimate: with `sparse_top` and `feature_map: performer`: a trained network estimates what
            each query pays to so many columns of keys, and `sparse_top` is the share of columns
            that each query reads (SEA). Trained by `calibrate` against the block's own attention.
    """

    mlp_width: int | None = Field(default=None, gt=0)
    flow: bool = False
    sparse_top: float | None = Field(default=None, ge=1 / PARTS, le=1.0)
    sparse_block: int = Field(default=64, gt=0)
    lowrank: bool = False
    estimate: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _fits_everywhere(self) -> EverywhereOptions:
        reason = contradiction(self)
        if reason:
            raise ValueError(reason)
        return self


def contradiction(o: Any) -> str:
    """Which options cannot stand together; "": all can.

    Args:
        o: `LinearOptions`.
    """
    asked = {
        "feature_map: mlp": o.feature_map == "mlp",
        "feature_map: performer": o.feature_map == "performer",
        "mlp_width": o.mlp_width is not None,
        "flow": o.flow,
        "sparse_top": o.sparse_top is not None,
        "lowrank": o.lowrank,
        "estimate": o.estimate is not None,
    }
    given = [name for name, is_given in asked.items() if is_given]
    if o.direction != "bidirectional":
        wrong = sorted(set(given) - {*CAUSAL}, key=lambda name: (name not in WHY, name))
        if wrong:
            return f"{wrong[0]} is for direction: bidirectional{WHY.get(wrong[0], '')}"
        if given and (o.window or o.decay != "none"):
            return f"{given[0]} is of all keys so far: set window: 0, and no decay"
        if o.sparse_top is not None and o.rope != "before":
            return "sparse_top of a causal block needs rope: before: rows are kept once, rotated"
    if o.mlp_width is not None and o.feature_map != "mlp":
        return "mlp_width is for feature_map: mlp"
    if o.flow and (o.sparse_top is not None or o.feature_map in (*_SIGNED, "performer")):
        return "flow needs features that are not negative, of all keys: no sparse_top"
    whole = o.normalize == "sum" and o.state == "per-query-head" and o.rope == "before"
    if (o.flow or o.feature_map == "performer") and not whole:
        what = "flow" if o.flow else "feature_map: performer"
        return f"{what} needs normalize: sum, state: per-query-head and rope: before"
    if o.estimate is not None and (o.sparse_top is None or o.feature_map != "performer"):
        return "estimate needs sparse_top, and feature_map: performer, which it estimates from"
    if o.estimate is not None and o.lowrank:
        return "estimate and lowrank both say what becomes of keys that are not chosen: give one"
    if o.lowrank and (o.sparse_top is None or o.feature_map != "performer"):
        return "lowrank needs sparse_top, and feature_map: performer, which estimates softmax"
    alone = not o.lowrank and o.estimate is None
    if o.sparse_top is not None and o.feature_map == "performer" and alone:
        return "feature_map: performer beside sparse_top shares one sum with it: set lowrank: true"
    if o.sparse_block != 64 and (o.sparse_top is None or o.estimate is not None):
        return "sparse_block is for sparse_top, without estimate"
    return ""


def settings(o: Any, hidden: int) -> dict[str, Any]:
    """The fields of `EverywhereConfig`.

    Args:
        o: `LinearOptions`.
        hidden: width of the block.
    """
    return {
        "mlp_width": (o.mlp_width or hidden) if o.feature_map == "mlp" else 0,
        "flow": o.flow,
        "sparse_top": o.sparse_top or 0.0,
        "sparse_block": o.sparse_block,
        "lowrank": o.lowrank,
        "estimate": o.estimate or 0,
    }


def everywhere_weights(made: LinearConfig) -> int:
    """Parameters of a block beside its own and its feature maps'."""
    hidden, inner, e = made.hidden_size, made.mlp_width, made.core.v_head_dim
    maps = 2 * ((hidden + 1) * inner + 2 * inner + (inner + 1) * hidden) if inner else 0
    drawn = made.feature_map == "performer"
    estimated = made.core.kv_heads * made.feature_dim * made.core.qk_head_dim if drawn else 0
    rest = e * (e + 1) if made.projects else 0
    return maps + estimated + rest + _network(made)


def _network(made: LinearConfig) -> int:
    """Parameters of what estimates columns."""
    h, inner, many = made.core.heads, 2 * made.core.v_head_dim, made.estimate
    if not many:
        return 0
    return (inner + 1) * (inner + many + 1) + 2 * inner + 2 * (9 * h + 1) * h


def everywhere_work(made: LinearConfig, length: int) -> int:
    """Multiply-adds per token of the blocks that are attended to, and of their choice."""
    if not made.sparse_top:
        return 0
    core, size = made.core, made.sparse_block
    if made.estimate:
        many, inner = made.estimate, 2 * core.v_head_dim
        read = made.top(many) * -(-length // many)
        each = inner * (inner + many + 1) + 18 * core.heads * many
        return core.heads * (read * (core.qk_head_dim + core.v_head_dim) + each)
    many = -(-length // size)
    read = min(length, made.top(many) * size)
    features = made.features if made.lowrank else 0  # what is taken out of the sum again
    rest = 0 if made.lowrank else core.v_head_dim**2
    asking = 1 if made.core.causal else size  # every query, or a block of them
    chosen = many * core.qk_head_dim // asking
    return core.heads * (read * (core.qk_head_dim + core.v_head_dim + features) + rest + chosen)


def everywhere_stated(made: EverywhereConfig) -> dict[str, Any]:
    """For the report."""
    told: dict[str, Any] = {}
    if made.mlp_width:
        told["mlp_width"] = made.mlp_width
    if made.flow:
        told["flow"] = "conserved at queries and keys"
    if made.estimate:
        told["estimate"] = f"{made.sparse_top:g} of {made.estimate} columns of keys"
    elif made.sparse_top:
        rest = "estimated, in one sum" if made.lowrank else "a sum, through a projection"
        told["sparse_top"] = f"{made.sparse_top:g} of the blocks of {made.sparse_block} tokens"
        told["other_keys"] = rest
    return told
