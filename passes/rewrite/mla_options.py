"""Options of `to: mla`: what each one chooses is described where it is computed.

The defaults are the method this project measured as best; `mixing: real`, `rope_select:
per-frequency`, `phase: one`, `rope_table: strided`, `latent: pca`, `center: false` is TransMLA
as published (preset `transmla-paper`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from reattend.mixers.config import Frozen
from reattend.passes.rewrite.per_layer import at_layer

Mixing = Literal["none", "real", "complex", "balanced"]
RopeSelect = Literal["per-frequency", "global", "per-head", "mean-key"]
Width = Annotated[int, Field(ge=0)]
Rank = Annotated[int, Field(ge=1)]


class MlaOptions(Frozen):
    """Options of `to: mla`.

    Attributes:
        kv_lora_rank: r, rows of the latent: a number, one per layer of the stack, or `auto`.
        qk_rope_head_dim: R, shared rotary dimensions (even): likewise; `auto` beside a number for
            r is the default width.
        kv_keep: share of the original cache instead of r; r = share x cache - R. With `auto` it
            is the budget of all sites of the rule together.
        allocate: how `auto` shares the budget: `error`, by measured output errors, or `energy`,
            the same share of latent energy everywhere (R stays fixed).
        mixing: how the heads of a frequency are mixed before components are chosen.
        rope_select: which components keep their rotation.
        phase: what stands in for a dropped rotation: `one`, or its `mean` over the distances
            that heads look back.
        rope_table: `free`, any frequencies; `strided`, those of a standard table of width R.
        latent: what the latent preserves: activations of keys and values (`pca`), their effect
            on the block's output (`output`), activations under a shrunk input covariance
            (`care`), or weights (`svd`).
        balance: weight of keys against values (TransMLA's balance_kv_ratio): 1 is equal,
            `derived` tries a few on the sample, `none` leaves both as they are.
        center: compress deviations from the mean, which is put back exactly.
        shrinkage: of `latent: care`, towards the identity: `derived` tries a few on the sample.
        fold: adjacent frequencies mixed in the published selection; `auto`: the smallest fit.
        q_lora_rank: rank of the query projection, none for a full one.
        latent_norm: `rms` puts DeepSeek's RMSNorm on the latent, its gain set to the mean size and
            one of the r rows spent on keeping sizes alike where that loses less.
        allow_growth: accept a cache larger than the original.
    """

    kv_lora_rank: Rank | tuple[Rank, ...] | Literal["auto"] | None = None
    qk_rope_head_dim: Width | tuple[Width, ...] | Literal["auto"] | None = None
    kv_keep: float | None = Field(default=None, gt=0, le=1)
    allocate: Literal["error", "energy"] = "error"
    mixing: Mixing = "balanced"
    rope_select: RopeSelect = "global"
    phase: Literal["one", "mean"] = "mean"
    rope_table: Literal["free", "strided"] = "free"
    latent: Literal["pca", "output", "care", "svd"] = "output"
    balance: Annotated[float, Field(ge=0.001, le=1000)] | Literal["derived", "none"] = 1.0
    center: bool = True
    shrinkage: Annotated[float, Field(ge=0, lt=1)] | Literal["derived"] = 0.01
    fold: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    q_lora_rank: int | None = Field(default=None, ge=1)
    latent_norm: Literal["none", "rms"] = "none"
    allow_growth: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> MlaOptions:
        if self.rope_table == "strided" and self.rope_select != "per-frequency":
            raise ValueError(
                f"rope_select: {self.rope_select} chooses its own frequencies, "
                "rope_table: strided fixes them; use rope_select: per-frequency"
            )
        if self.fold not in ("auto", 1) and not self.published:
            raise ValueError(
                "fold belongs to the published selection "
                "(mixing: real with rope_select: per-frequency); leave it out"
            )
        if self.rope_select in ("per-head", "mean-key") and self.mixing != "none":
            raise ValueError(f"rope_select: {self.rope_select} goes with mixing: none")
        if self.mixing == "none" and self.rope_select in ("per-frequency", "global"):
            raise ValueError(f"mixing: none does not go with rope_select: {self.rope_select}")
        if self.balance == "none" and self.latent == "output":
            raise ValueError("balance: none has no meaning for latent: output; give a ratio")
        return self

    @property
    def published(self) -> bool:
        """Whether the rotary selection is TransMLA's own, with its fold."""
        return self.mixing == "real" and self.rope_select == "per-frequency"

    @property
    def derived(self) -> bool:
        """Whether something is chosen by the block's output error on the sample."""
        return self.balance == "derived" or (self.latent == "care" and self.shrinkage == "derived")

    @property
    def ratio(self) -> float | None:
        """`balance` as a number: 1 while it is not derived yet, None for `none`."""
        if self.balance == "none":
            return None
        return 1.0 if self.balance == "derived" else self.balance

    @property
    def shrunk(self) -> float:
        """`shrinkage` as a number: the default one while it is not derived yet."""
        usual: float = MlaOptions.model_fields["shrinkage"].default
        return usual if self.shrinkage == "derived" else self.shrinkage

    @property
    def automatic(self) -> bool:
        """Whether sizes are chosen from statistics."""
        rank, rope = self.kv_lora_rank, self.qk_rope_head_dim
        return rank == "auto" or (rope == "auto" and rank is None)

    def at_layer(self, layer: int, layers: int) -> MlaOptions | str:
        """The options of one layer; the reason where a list has another length."""
        return at_layer(self, ("kv_lora_rank", "qk_rope_head_dim"), layer, layers)
