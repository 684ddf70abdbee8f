"""DuoAttention's way to find the KV heads that need every key: one trained number per head.

Xiao et al., arXiv 2410.10819. Every head's output is alpha x (full) + (1 - alpha) x (its pattern),
alpha from 1 on; all weights are frozen; the loss is what the model's output moves by, plus a price
on alpha. Heads whose alpha stays high see everything. AdamW at 0.02 with warm-up and cool-down over
a fifth of the steps each, alpha clamped to [0, 1], as in the released code. What differs: both
branches read the student's own activations, the distance is the KL of the model's output on text
that repeats itself (`repeats.repeated`), not an error of hidden states on passkeys.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import PlanError, TrainingError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.sparse import New, SparseAttention
from reattend.passes.rewrite.base import Measure, Subject
from reattend.passes.rewrite.sparse_build import sparse_like

#: of the mean alpha, against nats per token
PRICE = 0.05
LEARNING_RATE, RAMP, FLOOR = 0.02, 0.2, 0.1


class Blended(SparseAttention):
    """Both outputs of every head, mixed by `alpha_G`; for training without a cache."""

    alpha_G: nn.Parameter

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """alpha x full + (1 - alpha) x pattern."""
        assert isinstance(rows, New)
        part = super().attend(query, rows, ctx, span)
        full = DenseAttention.attend(self, (query, 0, None), rows[:2], ctx, None)
        core = self.config.core
        alpha = self.alpha_G.repeat_interleave(core.heads // core.kv_heads)[:, None, None]
        return alpha.to(full.dtype) * full + (1 - alpha.to(full.dtype)) * part


def blended(mixer: SparseAttention) -> Blended:
    """`mixer` with alpha = 1 and all its weights frozen."""
    made = sparse_like(mixer, mixer.config, Blended)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    made.alpha_G = nn.Parameter(torch.ones(mixer.config.core.kv_heads))
    return made


def alphas(
    mixers: Mapping[str, SparseAttention], measure: Measure, steps: int
) -> dict[str, Tensor]:
    """The trained alpha of every KV head, [G] by path.

    Raises:
        PlanError: the model cannot run with its blocks replaced.
        TrainingError: the loss is not a number.
    """
    students = {path: blended(copy.deepcopy(mixer)) for path, mixer in mixers.items()}
    trial = measure.trial(students)
    if trial is None:
        raise PlanError(
            "finder: alpha needs a model that can run with its blocks replaced",
            where="to: sparse",
            next_step="name the heads that stay in heads_full",
        )
    with trial as gap, torch.enable_grad():
        trained = [s.alpha_G for s in students.values()]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: ramp(step, steps))
        for step in range(steps):
            price = PRICE * torch.cat([alpha.abs() for alpha in trained]).mean()
            loss = gap() + price
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    "the search for heads diverged: the loss is not a number",
                    where=f"finder: alpha, step {step}",
                    next_step="convert in float32, or use finder: search",
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for alpha in trained:
                    alpha.clamp_(0.0, 1.0)
    return {path: s.alpha_G.detach().double().cpu() for path, s in students.items()}


def ramp(step: int, steps: int) -> float:
    """Share of the learning rate: up over a fifth of the steps, down to a tenth over the last."""
    length = max(1.0, RAMP * steps)
    up, down = (step + 1) / length, (steps - step) / length
    return min(1.0, up, max(FLOOR, down))


def best(sites: list[Subject], found: dict[str, Tensor], keep: float) -> list[tuple[int, ...]]:
    """KV heads of every site that stay full: the largest numbers of all sites together."""
    ranked = sorted(
        ((-float(a), n, h) for n, s in enumerate(sites) for h, a in enumerate(found[s.path])),
    )
    kept = ranked[: round(keep * len(ranked))]
    return [tuple(sorted(h for _, n, h in kept if n == number)) for number in range(len(sites))]
