"""`to: linear`: softmax over a window of keys, and a state of fixed size for all older ones.

One conversion serves LoLCATs, Hedgehog, T2R, SUPRA and Liger, and bidirectional blocks (encoders,
vision, diffusion) without a window; presets name their options. The block keeps its weights;
feature maps and the weight of the window are new, start without statistics, and are meant to be
trained (`calibrate`). Exact with a window as long as the text, and with nothing else, so every
plan with a smaller one is `learned`. The formulas with the symbols used here:
docs/math/linear.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.flowing import FlowingAttention
from reattend.mixers.flowing_config import FlowingConfig
from reattend.mixers.linear import LinearAttention
from reattend.mixers.linear_config import (
    DOUBLED,
    LEARNED,
    FeatureMapName,
    LinearConfig,
    WindowForm,
)
from reattend.mixers.recurrent import RecurrentAttention
from reattend.mixers.recurrent_config import RecurrentConfig
from reattend.mixers.sparse_linear import SparseLinearAttention
from reattend.mixers.sparse_linear_config import SparseLinearConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, dense_cost, regrouped
from reattend.passes.rewrite.linear_everywhere import (
    EverywhereOptions,
    everywhere_work,
    settings,
)
from reattend.passes.rewrite.linear_numbers import own_weights, stated
from reattend.passes.rewrite.sparse_build import like

#: Descriptions and mixers by kind.
FORMS: dict[str, tuple[type[LinearConfig], type[LinearAttention]]] = {
    "linear": (LinearConfig, LinearAttention),
    "recurrent": (RecurrentConfig, RecurrentAttention),
    "flowing": (FlowingConfig, FlowingAttention),
    "sparse-linear": (SparseLinearConfig, SparseLinearAttention),
}
#: A window that no text is longer than.
ENDLESS = 2**30


class LinearOptions(EverywhereOptions):
    """What reaches how far back.

    Attributes:
        direction: `causal`, or `bidirectional` for blocks in which every token sees all (encoders,
            vision, diffusion): one sum over all keys, no window, no decay.
        feature_map: see `reattend.mixers.features`.
        feature_dim: rows of its weights per head; None: the head width.
        feature_init: `identity` (only at the head width), or `uniform`, small numbers; None:
            identity where it fits.
        normalize: what linear sums are divided by: `sum` of the weights, `group` (RetNet's norm of
            each head), `rms` (one norm of all heads), `none`.
        decay: `fixed`: head h of S leaves exp(-2^(-8 h / S)) of the state per token, h from 1;
            `gated`: a token leaves sigmoid(k)^(1 / gate_divisor) of the state's rows, k the numbers
            that its key's features are made of; `selective`: a Mamba-2 layer (`linear_selective`).
        gate_divisor: see `decay`.
        window: keys attended to by softmax; 0: none.
        window_form: `terraced`, the query's own block of `window` tokens and the one before, or
            `sliding`, the last `window`.
        mix: whether the weight of the window is trained.
        mix_start: that weight, or where it starts.
        mix_form: `shared`: window and older keys are divided by one sum, the window's weighted by
            m; `blended`: likewise, by m and 1 - m, so m near 1 starts near a window alone;
            `averaged`: the state holds all keys, each is divided by its own, and the weight is
            the window's share.
        rope: whether features are made `before` rotating, `after` it, or of what is not rotated
            (`window-only`). `before`: keys are rotated before they are mapped.
        state: one for each query head, or one for each KV head.
    """

    direction: Literal["causal", "bidirectional"] = "causal"
    feature_map: FeatureMapName = "hedgehog"
    feature_dim: int | None = Field(default=None, gt=0)
    feature_init: Literal["identity", "uniform"] | None = None
    normalize: Literal["sum", "group", "rms", "none"] = "sum"
    decay: Literal["none", "fixed", "gated", "selective"] = "none"
    gate_divisor: float = Field(default=16.0, gt=0.0)
    window: int = Field(default=64, ge=0)
    window_form: WindowForm = "terraced"
    mix: Literal["learned", "fixed"] = "learned"
    mix_start: float = Field(default=0.1, gt=0.0, lt=1.0)
    mix_form: Literal["shared", "blended", "averaged"] = "shared"
    rope: Literal["before", "after", "window-only"] = "before"
    state: Literal["per-query-head", "per-kv-head"] = "per-query-head"

    @model_validator(mode="after")
    def _are_consistent(self) -> LinearOptions:
        signed = self.feature_map in ("identity", "silu") or self.rope == "after"
        if self.normalize == "sum" and signed:
            raise ValueError(
                "normalize: sum divides by a sum of weights, which feature_map: identity or silu "
                "and rope: after can make zero or negative; set normalize: group"
            )
        if self.window and self.mix_form != "averaged" and self.normalize != "sum":
            raise ValueError(
                "a window shares the sum that it is divided by: set normalize: sum, or window: 0, "
                "or mix_form: averaged"
            )
        if self.mix_form == "averaged" and not self.window:
            raise ValueError("mix_form: averaged is of a window and a state: give a window")
        self._gate_is_consistent()
        if self.direction == "bidirectional" and (self.window or self.decay != "none"):
            raise ValueError(
                "direction: bidirectional sums all keys once: set window: 0, and no decay"
            )
        sized = (*LEARNED, "performer") if self.feature_init is None else LEARNED
        if self.feature_map not in sized and (self.feature_dim or self.feature_init):
            raise ValueError(f"feature_map: {self.feature_map} has no weights to give a size")
        if self.rope == "after" and self.feature_map in DOUBLED:
            raise ValueError("rope: after rotates features, and hedgehog has two for each number")
        return self

    def _gate_is_consistent(self) -> None:
        if self.decay != "gated":
            return
        if self.window and self.mix_form != "averaged":
            raise ValueError(
                "decay: gated gates every key when it comes, and a window holds keys back: set "
                "mix_form: averaged, or window: 0"
            )
        if self.feature_map in DOUBLED or self.rope == "after":
            raise ValueError(
                "decay: gated has one number of the key for each feature: choose another "
                "feature_map than hedgehog, and rope: before or window-only"
            )

    @property
    def form(self) -> str:
        """The mixer's kind. `recurrent`: every key enters the state at once, gated or beside a
        window of its own.
        """
        if self.decay == "gated" or self.mix_form == "averaged":
            return "recurrent"
        if self.direction == "bidirectional" or not (self.flow or self.sparse_top):
            return "linear"
        return "flowing" if self.flow else "sparse-linear"


class ToLinear(Conversion):
    """Softmax attention to linear attention, with or without a window."""

    name = "linear"
    Options = LinearOptions

    def check(self, config: DenseConfig, options: LinearOptions) -> Refusal | None:
        """Reads no weight."""
        core, width = config.core, config.core.qk_head_dim
        if config.cross:
            return Refusal("cross-attention: its keys have no order for a state to follow")
        if (moved := regrouped(config)) is not None:
            return moved
        causal = options.direction == "causal"
        if core.pattern in ("sliding", "chunked"):
            return Refusal(
                f"the block's own pattern is {core.pattern}: it forgets older keys by itself, and "
                "its cache is bounded already"
            )
        if core.pattern == "opaque":
            return Refusal("the mask is the model's own, and a state cannot leave out single keys")
        if core.pattern == "full" and causal:
            return Refusal(
                "the block is not causal: tokens see later ones, a state does not; "
                "direction: bidirectional with window: 0 sums all keys"
            )
        if core.pattern != "full" and not causal:
            return Refusal(
                "the block is causal, and direction: bidirectional would show later tokens; some "
                "options have a causal form: set direction: causal"
            )
        if core.softcap:
            return Refusal("scores are capped by tanh, which sums of features cannot follow")
        if core.sinks:
            return Refusal("every head has a logit of no key, which the state has no place for")
        if config.added is not None or config.relative is not None or config.alibi is not None:
            return Refusal("a position bias is added to the scores, which a state cannot apply")
        rows = options.feature_dim or width
        if options.feature_init == "identity" and rows != width:
            return Refusal(f"feature_init: identity needs feature_dim {width}, the head width")
        if options.rope == "after" and config.rotary is not None and rows != width:
            return Refusal(f"rope: after rotates features: feature_dim must be {width}")
        if options.decay == "gated" and rows != width:
            return Refusal(
                f"decay: gated has a number for each feature: feature_dim must be {width}"
            )
        return None

    def check_within(
        self, config: DenseConfig, options: LinearOptions, longest: int
    ) -> Refusal | None:
        """A window as long as any text holds more than a cache and changes nothing."""
        if options.window >= longest and options.window < ENDLESS:
            return Refusal(
                f"window: {options.window} reaches over the longest text the model reads "
                f"({longest} tokens), so nothing would be linear: give a smaller one"
            )
        return None

    def described(self, config: DenseConfig, options: LinearOptions) -> LinearConfig:
        """The mixer's description."""
        core = config.core
        heads = core.heads if options.state == "per-query-head" else core.kv_heads
        slopes = tuple(-(2.0 ** (-8 * (h + 1) / heads)) for h in range(heads))
        own: dict[str, Any] = {}
        if options.form == "recurrent":
            own = {"decay_by": "keys" if options.decay == "gated" else "none"}
            own["gate_divisor"] = options.gate_divisor
        made: LinearConfig = FORMS[options.form][0].model_validate(
            {
                **config.model_dump(exclude={"kind"}),
                **own,
                "direction": options.direction,
                "feature_map": options.feature_map,
                "feature_dim": options.feature_dim or core.qk_head_dim,
                "normalize": "none" if options.form == "flowing" else options.normalize,
                "decay": slopes if options.decay == "fixed" else (),
                "window": options.window,
                "window_form": options.window_form,
                "mix": options.mix_start,
                "mix_learned": options.mix == "learned",
                "blended": options.mix_form == "blended",
                "rope": options.rope,
                "state": options.state,
                **settings(options, config.hidden_size),
            }
        )
        return made

    def outcome(self, config: DenseConfig, options: LinearOptions) -> LinearConfig:
        """The mixer's description; nothing is left to statistics."""
        return self.described(config, options)

    def exact_setting(self, config: DenseConfig) -> LinearOptions:
        """A window that no text is longer than, or all blocks of keys: none is ever linear."""
        if config.core.pattern == "full":
            return LinearOptions(
                direction="bidirectional", window=0, feature_map="softmax", sparse_top=1.0
            )
        return LinearOptions(
            feature_map="elu+1", window=ENDLESS, window_form="sliding", mix="fixed", mix_start=0.5
        )

    def cost(self, config: DenseConfig, options: LinearOptions) -> Cost:
        """What is held in place of the cache, spread over the context of the original's cost."""
        before, made, core = dense_cost(config), self.described(config, options), config.core
        length, each = before.context, core.qk_head_dim + core.v_head_dim
        rows = min(made.held_rows, length)
        attention, near = core.heads * each * length, core.heads * each * rows
        grown = own_weights(made)
        # the state is read for every query head, and a key is added to every head of it
        moved = (core.heads + made.state_heads) * made.features * made.columns
        near += everywhere_work(made, length)
        flops = before.flops_per_token + 2 * (near + moved + grown - attention)
        numbers = made.held_after(length) if options.direction == "causal" else 0
        return Cost(
            -(-numbers // length), before.parameters + grown, flops, length, before.parameters
        )

    def build(self, dense: DenseAttention, statistics: Any, options: LinearOptions) -> Built:
        """The same weights, and feature maps at their start."""
        made = self.described(dense.config, options)
        mixer = like(dense, FORMS[options.form][1])
        mixer.begin(made)
        identity = options.feature_init == "identity" or (
            options.feature_init is None and made.feature_dim == made.core.qk_head_dim
        )
        weight = dense.q_proj.weight if hasattr(dense.q_proj, "weight") else None
        for new in (mixer.features_q, mixer.features_k):
            new.start(identity)
            if weight is not None:
                new.to(weight)
        if mixer.everywhere is not None:
            mixer.everywhere.start()
            mixer.everywhere.to(next(dense.parameters()))
        if mixer.mix_H is not None and weight is not None:
            mixer.mix_H.data = mixer.mix_H.data.to(weight)
        endless = options.window >= ENDLESS and options.form == "linear"
        exact = endless or options.sparse_top == 1.0
        return Built(mixer.train(dense.training), "exact" if exact else "learned", stated(made))
