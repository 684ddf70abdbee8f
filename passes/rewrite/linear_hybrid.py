"""`to: linear` as a block among others: decays by its place in the stack, and `linear_share`.

With `linear_share` only the blocks that lose least by it become linear.

What a block loses is measured before any is chosen, as stage 1 of training would see it: its
linear form reads rows of the block's own input, its new weights are trained for a few steps to give
the block's output, and the error on another row counts. Blocks are independent, so this is paid
once for each. LoLCATs (Zhang et al., arXiv 2410.10254) and Mamba-in-Llama (Wang et al., arXiv
2408.15237) keep a share of softmax layers by their place in the stack; here the error decides.
Feature maps without weights have nothing to train and are compared as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from reattend.errors import PlanError
from reattend.mixers.base import Context, Mixer
from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.linear_config import LinearConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, Measure, Subject, dense_cost
from reattend.passes.rewrite.dense import ToDense
from reattend.passes.rewrite.linear_selective import SelectiveOptions, ToSelective
from reattend.statistics import SAMPLE_ROWS, SAMPLE_TOKENS, Need

#: Steps of AdamW on a block's new weights, and its learning rate (LoLCATs').
STEPS, RATE = 24, 1e-2
#: What Lightning Attention adds to both, so that no layer has a decay of exactly 0.
NEVER_ZERO = 1e-5


class HybridOptions(SelectiveOptions):
    """Which blocks of the rule become linear, and what their places change.

    Attributes:
        decay_rate: factor of fixed decays.
        decay_by_layer: of n layers, number i from 0 has them times 1 - i / (n - 1), and the last
            hardly any (Lightning Attention, MiniMax).
        linear_share: how many of them: those whose output the linear form comes nearest to; the
            others keep softmax attention, and their cache grows with the text.
        linear: whether this block is one of them, where that has been measured; not for plans.
    """

    decay_rate: float = Field(default=1.0, ge=0.0)
    decay_by_layer: bool = False
    linear_share: float = Field(default=1.0, gt=0.0, le=1.0)
    linear: bool | None = None


class ToHybrid(ToSelective):
    """All blocks of a rule, or those that lose least; the conversion that plans name."""

    Options = HybridOptions

    def check(self, config: DenseConfig, options: HybridOptions) -> Refusal | None:  # type: ignore[override]
        """Reads no weight."""
        if options.linear_share < 1 and config.out_features is None:
            return Refusal(
                "linear_share compares whole blocks by their outputs: leave out `heads`, or "
                "linear_share"
            )
        if options.linear_share < 1 and config.core.pattern == "opaque":
            return Refusal("linear_share runs blocks alone, and the mask is the model's own")
        return super().check(config, options)

    def for_layer(self, options: HybridOptions, layer: int, layers: int) -> HybridOptions | Refusal:
        """The decays of a layer."""
        if not options.decay_by_layer:
            return options
        if options.decay != "fixed":
            return Refusal("decay_by_layer is about fixed decays: set decay: fixed")
        left = 1 - layer / (layers - 1 + NEVER_ZERO) + NEVER_ZERO
        return options.model_copy(
            update={"decay_rate": options.decay_rate * left, "decay_by_layer": False}
        )

    def described(self, config: DenseConfig, options: HybridOptions) -> LinearConfig:  # type: ignore[override]
        """The mixer's description."""
        made = super().described(config, options)
        return made.model_copy(update={"decay": tuple(x * options.decay_rate for x in made.decay)})

    def undecided(self, options: HybridOptions) -> bool:
        """Whether blocks are to be compared."""
        return options.linear_share < 1 and options.linear is None

    def wants(self, config: DenseConfig, options: HybridOptions) -> frozenset[Need]:
        """Rows of the block's input, where blocks are compared."""
        return frozenset({"gram", "sample"}) if self.undecided(options) else frozenset()

    def trials(self, configs: Sequence[DenseConfig], options: HybridOptions) -> int:
        """None: blocks are compared alone."""
        return 0

    def solves(self, options: HybridOptions) -> int:
        """Never."""
        return 0

    def training(
        self, config: DenseConfig, options: HybridOptions, length: int
    ) -> tuple[float, float]:
        """Steps on a sample: three times a forward each, and a copy of the block with gradients."""
        if not self.undecided(options):
            return 0.0, 0.0
        tokens = SAMPLE_ROWS * min(length, SAMPLE_TOKENS)
        cost = super().cost(config, options)
        return float(3 * STEPS * tokens * cost.flops_per_token), 16.0 * cost.parameters

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """The share with the least errors is linear.

        Raises:
            PlanError: no rows to compare blocks on, or no row is longer than the window.
        """
        options: HybridOptions = sites[0].options
        errors = [self.error(s.dense, s.statistics.samples or [], options) for s in sites]
        if max(errors) <= 1e-9:
            raise PlanError(
                "the blocks cannot be told apart: no key of the calibration rows is older than the "
                "window",
                where="to: linear",
                next_step="raise calibrate.seq_len to more than twice the window, or narrow it",
            )
        count = max(1, round(options.linear_share * len(sites)))
        order = sorted(range(len(sites)), key=lambda n: errors[n])
        taken = set(order[:count])
        return [s.options.model_copy(update={"linear": n in taken}) for n, s in enumerate(sites)]

    def error(self, dense: DenseAttention, rows: Sequence[Tensor], options: HybridOptions) -> float:
        """Share of the output's energy that the linear form misses on the last row.

        Raises:
            PlanError: no rows.
        """
        if not rows:
            raise PlanError(
                "linear_share compares blocks on calibration rows, and there are none",
                where="to: linear",
                next_step="give data= or `calibrate: {data: ...}`",
            )
        original = copy.deepcopy(dense).float()
        mixer = super().build(original, None, options).mixer
        device = next(dense.parameters()).device
        with torch.no_grad():
            given = [x.float().to(device)[None] for x in rows]
            *learn, last = [(x, original(x, Context())) for x in given]
        own = {name for name, _ in original.named_parameters()}
        new = [p for name, p in mixer.named_parameters() if name not in own]
        if new:
            _trained(mixer, new, learn or [last])
        with torch.no_grad():
            return float(_gap(mixer, *last))

    def instead(self, options: HybridOptions) -> Conversion | None:
        """The block as it is, where others lose less."""
        return ToDense() if options.linear is False else None

    def outcome(self, config: DenseConfig, options: HybridOptions) -> Frozen | None:  # type: ignore[override]
        """None until the blocks have been compared."""
        if self.undecided(options):
            return None
        return config if options.linear is False else self.described(config, options)

    def cost(self, config: DenseConfig, options: HybridOptions) -> Cost:  # type: ignore[override]
        """Of the block; before they are compared, what it is on average."""
        linear = super().cost(config, options)
        if options.linear is not None or options.linear_share == 1:
            return dense_cost(config) if options.linear is False else linear
        kept, share = dense_cost(config), options.linear_share

        def between(a: int, b: int) -> int:
            return round(share * a + (1 - share) * b)

        return Cost(
            between(linear.cache, kept.cache), between(linear.parameters, kept.parameters),
            between(linear.flops_per_token, kept.flops_per_token), kept.context, linear.kept,
        )  # fmt: skip

    def build(self, dense: DenseAttention, statistics: Any, options: HybridOptions) -> Built:  # type: ignore[override]
        """The linear form, or the block as it is."""
        if options.linear is False:
            return Built(dense, "exact", {"linear": "no: others of the rule lose less by it"})
        return super().build(dense, statistics, options)


def _gap(mixer: Mixer, x_1nD: Tensor, target_1nD: Tensor) -> Tensor:
    """Relative squared error of the output on one row."""
    missed: Tensor = (mixer(x_1nD, Context()) - target_1nD).square().sum()
    error: Tensor = missed / target_1nD.square().sum()
    return error


def _trained(
    mixer: Mixer, new: list[torch.nn.Parameter], rows: list[tuple[Tensor, Tensor]]
) -> None:
    """A few steps on the new weights, in place; rows of inputs and of the block's outputs."""
    optimizer = torch.optim.AdamW(new, lr=RATE, weight_decay=0.0)
    with torch.enable_grad():
        for step in range(STEPS):
            loss = _gap(mixer, *rows[step % len(rows)])
            # a window over the whole row leaves weights of features without a part in it
            grads = torch.autograd.grad(loss, new, allow_unused=True)
            for p, grad in zip(new, grads, strict=True):
                p.grad = grad
            optimizer.step()
