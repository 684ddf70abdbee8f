"""`to: linear` with `decay: selective`: the block's projections in a Mamba-2 layer.

Mamba-in-Llama, Wang et al., arXiv 2408.15237: values, keys and queries become what the layer calls
x, B and C, and the output projection stays. `converter/mixers/selective.py` has the formulas. Much
is new, and nothing of it starts near the original.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.linear_config import LinearConfig
from reattend.mixers.selective import SelectiveAttention
from reattend.mixers.selective_config import SelectiveConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Cost, dense_cost
from reattend.passes.rewrite.linear import LinearOptions, ToLinear
from reattend.passes.rewrite.sparse_build import like

#: What a selective state needs of the other options.
NEEDED = {
    "feature_map": "identity", "normalize": "none", "window": 0, "rope": "window-only",
    "state": "per-query-head", "direction": "causal",
}  # fmt: skip


class SelectiveOptions(LinearOptions):
    """Options of a state that chooses by what it reads.

    Attributes:
        conv: tokens that the short convolution of `decay: selective` sees.
    """

    conv: int = Field(default=4, gt=1)

    @model_validator(mode="after")
    def _is_plain(self) -> SelectiveOptions:
        wrong = [f"{key}: {value}" for key, value in NEEDED.items() if getattr(self, key) != value]
        if self.decay == "selective" and wrong:
            raise ValueError(f"decay: selective needs {', '.join(wrong)}")
        return self


class ToSelective(ToLinear):
    """Linear attention, or a state-space layer of the same projections."""

    Options = SelectiveOptions

    def check(self, config: DenseConfig, options: SelectiveOptions) -> Refusal | None:  # type: ignore[override]
        """Reads no weight."""
        if options.decay == "selective" and config.out_features is None:
            return Refusal("decay: selective makes a gate of the whole block: leave out `heads`")
        return super().check(config, options)

    def described(self, config: DenseConfig, options: SelectiveOptions) -> LinearConfig:  # type: ignore[override]
        """The mixer's description."""
        if options.decay != "selective":
            return super().described(config, options)
        return SelectiveConfig.model_validate(
            {
                **config.model_dump(exclude={"kind"}),
                **{k: v for k, v in NEEDED.items() if k != "window"},
                "feature_dim": config.core.qk_head_dim,
                "conv": options.conv,
            }
        )

    def cost(self, config: DenseConfig, options: SelectiveOptions) -> Cost:  # type: ignore[override]
        """What is held in place of the cache, spread over the context of the original's cost."""
        if options.decay != "selective":
            return super().cost(config, options)
        before, made, core = dense_cost(config), self.described(config, options), config.core
        assert isinstance(made, SelectiveConfig)
        length, each = before.context, core.qk_head_dim + core.v_head_dim
        grown = selective_weights(made)
        moved = 2 * core.heads * made.features * made.columns
        flops = before.flops_per_token + 2 * (moved + grown - core.heads * each * length)
        held = -(-made.held_after(length) // length)
        return Cost(held, before.parameters + grown, flops, length, before.parameters)

    def build(self, dense: DenseAttention, statistics: Any, options: SelectiveOptions) -> Built:  # type: ignore[override]
        """The same weights, and new ones at their published start."""
        if options.decay != "selective":
            return super().build(dense, statistics, options)
        made = self.described(dense.config, options)
        assert isinstance(made, SelectiveConfig)
        mixer = like(dense, SelectiveAttention)
        mixer.begin(made)
        mixer.start()
        old = next(dense.parameters())
        for name, module in mixer.named_children():
            if name not in dict(dense.named_children()):
                module.to(old)
        for name in ("a_log_H", "skip_H", "norm_He"):
            parameter = getattr(mixer, name)
            parameter.data = parameter.data.to(old)
        told = {
            "decay": "selective, per head",
            "state_numbers": made.state_numbers,
            "new_weights": selective_weights(made),
            "held_in_tokens": f"{made.held_after(made.conv) / made.cache_per_token:.1f}",
        }
        return Built(mixer.train(dense.training), "learned", told)


def selective_weights(made: SelectiveConfig) -> int:
    """Parameters beside the block's own."""
    core, hidden = made.core, made.hidden_size
    gate = core.heads * core.v_head_dim
    return hidden * (gate + core.heads) + made.channels * (made.conv + 1) + 3 * core.heads + gate
