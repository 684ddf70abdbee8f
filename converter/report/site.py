"""What a report says about the model and about one attention site."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from reattend.report.part import Number, Part

Action = Literal["converted", "kept", "refused", "not-understood", "unmatched"]
Exactness = Literal["exact", "bounded", "learned"]


class ModelInfo(Part):
    """The model the report is about."""

    architecture: str = Field(description="class name, for example LlamaForCausalLM")
    dtype: str = Field(description="dtype of the stored weights")
    name: str = Field(default="", description="what the user calls it; never a path")
    parameters_before: int | None = Field(default=None, ge=0)
    parameters_after: int | None = Field(default=None, ge=0)
    source_hash: str = Field(default="", description="hash over the source weights")


class SpecSummary(Part):
    """The attention spec of a site, in the numbers a reader asks for (widths per head)."""

    heads: int = Field(ge=1, description="query heads H")
    kv_heads: int = Field(ge=1, description="key and value heads G")
    hidden: int = Field(ge=1, description="hidden width D")
    qk_width: int = Field(ge=1, description="query and key width per head d")
    v_width: int = Field(ge=1, description="value width per head")
    rotary_width: int = Field(default=0, ge=0, description="rotated dimensions per head; 0: none")
    pattern: str = Field(default="causal", description="full, causal, sliding(w), chunked(c), ...")
    norms: tuple[str, ...] = Field(default=(), description="streams that are normalised: q, k, v")
    bias: tuple[str, ...] = Field(default=(), description="projections with a bias: q, k, v, o")
    extras: tuple[str, ...] = Field(
        default=(), description="anything else: softcap 50, sinks, gate"
    )

    def text(self) -> str:
        """One line, for example `8 heads, 2 KV x 32, rotary 32, causal`."""
        widths = f"{self.qk_width}"
        if self.v_width != self.qk_width:
            widths += f"/{self.v_width}"
        parts = [
            f"{self.heads} head{'s' if self.heads > 1 else ''}",
            f"{self.kv_heads} KV × {widths}",
            f"rotary {self.rotary_width}" if self.rotary_width else "no rotary",
            self.pattern,
        ]
        if self.norms:
            parts.append("/".join(self.norms) + " norm")
        if self.bias:
            parts.append("/".join(self.bias) + " bias")
        return ", ".join([*parts, *self.extras])


class Cost(Part):
    """What one site costs, per token, when the context holds `context` tokens."""

    cache_numbers_per_token: Number = Field(description="numbers cached per token, batch 1")
    cache_bytes_per_token: Number = Field(description="the same in bytes of the cache dtype")
    parameters: int = Field(ge=0)
    flops_per_token: Number | None = Field(
        default=None, description="decode, one token, at `context`"
    )
    context: int | None = Field(default=None, ge=1, description="tokens in context for this cost")


class SiteCost(Part):
    """Cost of a site before and after; a site that was not changed has both equal."""

    before: Cost
    after: Cost


class SiteError(Part):
    """What the conversion of one site lost; shares are between 0 and 1."""

    output_relative: Number | None = Field(
        default=None, description="norm of the attention output difference / norm of the original"
    )
    output_bound: Number | None = Field(
        default=None,
        description="proven bound on output_relative, from what the conversion discarded on the "
        "tokens measured; where bounded",
    )
    discarded_energy: Number | None = Field(
        default=None,
        description="energy share outside the rank on the calibration tokens; no bound on outputs",
    )
    rank: int | None = Field(default=None, ge=0, description="rank that was kept")
    energy_kept: tuple[Number, ...] = Field(
        default=(), description="energy share kept at rank 1, 2, ..."
    )
    rotary_energy_kept: Number | None = Field(
        default=None, description="share of the key energy that keeps its rotary"
    )


class HeadGroup(Part):
    """Some heads of a site that were converted apart from the others."""

    heads: tuple[int, ...] = Field(description="key/value groups, counted from 0")
    conversion: str = Field(description="kebab-case name; dense: as they were")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="as resolved")
    exactness: Exactness | None = None
    cache_numbers_per_token: int = Field(ge=0)
    error: SiteError | None = Field(default=None, description="of this group alone")


class Owner(Part):
    """Which part of the model carries the site now (design: one owner)."""

    kind: Literal["module", "graph"] = "module"
    path: str = ""
    class_name: str = ""
    lacks: tuple[str, ...] = Field(default=(), description="what no longer works: generate, train")


class SiteEntry(Part):
    """One attention site: what it is, what was done with it or why not, cost and error."""

    path: str = Field(min_length=1, description="dotted path in the model")
    action: Action
    kind: Literal["self", "cross"] = "self"
    layer: int | None = Field(default=None, ge=0, description="layer index within its stack")
    spec: SpecSummary | None = None
    verified: bool | None = Field(default=None, description="rebuilt from its spec and found equal")
    conversion: str = Field(default="", description="kebab-case name of the conversion")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="as resolved")
    groups: tuple[HeadGroup, ...] = Field(
        default=(), description="parts of a site whose heads were converted apart; else empty"
    )
    reason: str = Field(default="", description="why it was kept, refused or not understood")
    exactness: Exactness | None = None
    cost: SiteCost | None = None
    error: SiteError | None = None
    head_use: tuple[Number, ...] = Field(
        default=(),
        description="share of held-out tokens that use each head, or KV group, of those that are "
        "chosen token by token",
    )
    owner: Owner | None = None

    @model_validator(mode="after")
    def _unchanged_costs_the_same(self) -> SiteEntry:
        """A saving that did not happen must not reach the totals; put it into `reason`."""
        cost = self.cost
        if self.action != "converted" and cost is not None and cost.before != cost.after:
            raise ValueError(f"{self.path} is {self.action}, so its cost after is its cost before")
        return self

    @property
    def label(self) -> str:
        """Short name for axes and tables: `layer 3`, or the path where there is no layer."""
        return self.path if self.layer is None else f"layer {self.layer}"
