"""Which heads look far, in seconds: no gradient, no repeated text, a few runs of the model.

As NVIDIA's kvpress scores heads for DuoAttention (`duo_attention_on_the_fly`, 2026-08): the mean
query and the mean key of a head over texts are put at all positions of a row and rotated, and the
last query's attention is summed up from the first key on. The mean of that running sum is the
score: 1/2 for a head that looks everywhere alike, near 0 for one that looks at its neighbours.

Where positions are not rotary, heads are scored by the mean share of attention that they give to
keys which the pattern hides, over the same texts. A KV head has the mean of its query heads' scores
in both cases, as in kvpress.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from reattend.errors import PlanError
from reattend.mixers.base import Context, State
from reattend.mixers.block import project
from reattend.mixers.dense import DenseAttention, stream
from reattend.mixers.places import valid_tokens
from reattend.mixers.rotary import rotate
from reattend.mixers.scores import probabilities
from reattend.passes.rewrite.base import Measure, Subject
from reattend.passes.rewrite.sparse_build import like
from reattend.passes.rewrite.sparse_watch import Look, watched
from reattend.patterns.pattern import HeadPattern

#: Calls of the model on a few rows each; kvpress reads 50 texts.
CALLS = 12


class Averaged(DenseAttention):
    """Computes what the block did, and sums its queries and keys before their rotation."""

    sums: tuple[Tensor, Tensor]  # [H, d] and [G, d], float64
    tokens: int

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """See `Mixer.project`."""
        c = self.config
        q = stream(project(self.q_proj, x_BND, ctx), c.core.heads, c.q, self.q_norm, None, 0)
        k = stream(project(self.k_proj, x_BND, ctx), c.core.kv_heads, c.k, self.k_norm, None, 0)
        valid = valid_tokens(ctx.mask, *x_BND.shape[:2])
        real = torch.ones(x_BND.shape[:2]) if valid is None else valid
        for total, new in zip(self.sums, (q, k), strict=True):
            total += torch.einsum("bhnd,bn->hd", new.double(), real.to(new.device).double()).cpu()
        self.tokens += int(real.sum())
        return super().project(x_BND, source_BMD, ctx, state)


def averaged(dense: DenseAttention) -> Averaged:
    """A block around the modules of `dense`, with empty sums."""
    made, core = like(dense, Averaged), dense.config.core
    made.sums = (
        torch.zeros(core.heads, core.qk_head_dim, dtype=torch.float64),
        torch.zeros(core.kv_heads, core.qk_head_dim, dtype=torch.float64),
    )
    made.tokens = 0
    return made


def instant(sites: list[Subject], measure: Measure) -> dict[str, Tensor]:
    """The score of every KV head, [G] by path.

    Raises:
        PlanError: the model cannot run with its blocks replaced.
    """
    if all(s.dense.config.rotary is not None for s in sites):
        means = {s.path: averaged(s.dense) for s in sites}
        _run(measure, means)
        return {path: area(mixer, measure.length) for path, mixer in means.items()}
    pattern: HeadPattern = sites[0].options.pattern
    mass = {s.path: torch.zeros(s.dense.config.core.kv_heads).double() for s in sites}

    def watch(path: str, look: Look, y: Tensor) -> Tensor:
        mass[path] += torch.stack(
            [distant(look, head, pattern) for head in range(look.core.kv_heads)]
        )
        return y

    _run(measure, {s.path: watched(s.dense, partial(watch, s.path)) for s in sites})
    return mass


def _run(measure: Measure, mixers: dict[str, Any]) -> None:
    """The calibration rows, as many as `CALLS` calls take."""
    trial = measure.trial(mixers)
    if trial is None:
        raise PlanError(
            "finder: instant needs a model that can run with its blocks replaced",
            where="to: sparse",
            next_step="name the heads that stay in heads_full",
        )
    with trial as gap, torch.no_grad():
        for _ in range(CALLS):
            gap()


def area(mixer: Averaged, length: int) -> Tensor:
    """Mean of the running sum of the last query's attention to the mean key at all positions, [G].

    Args:
        mixer: with the sums of its texts.
        length: positions.
    """
    c = mixer.config
    assert c.rotary is not None
    q_Hd, k_Gd = (total / mixer.tokens for total in mixer.sums)
    angle = torch.arange(length)[:, None] * torch.tensor(c.rotary.inv_freq, dtype=torch.float64)
    turn = ((angle.cos() * c.rotary.scaling)[None], (angle.sin() * c.rotary.scaling)[None])
    last = (turn[0][:, -1:], turn[1][:, -1:])
    each = c.core.heads // c.core.kv_heads
    k_1GNd = rotate(k_Gd[None, :, None].expand(-1, -1, length, -1), turn, c.rotary.pairs)
    q_1H1d = rotate(q_Hd[None, :, None], last, c.rotary.pairs)
    a_1H1N = probabilities(q_1H1d, k_1GNd.repeat_interleave(each, 1), c.core, None)
    area_H: Tensor = a_1H1N[0, :, 0].cumsum(-1).mean(-1)
    return area_H.view(-1, each).mean(-1)


def distant(look: Look, head: int, pattern: HeadPattern) -> Tensor:
    """Mean share that the query heads of a KV head give to keys which a pattern hides."""
    length = look.q.shape[2]
    j = torch.arange(length, device=look.q.device)[None]
    total = torch.zeros((), dtype=torch.float64)
    for here, a_BrnN in look.strips(head):
        hidden = ~pattern.sees(torch.arange(length, device=j.device)[here, None], j, look.core)
        total += (a_BrnN * hidden).double().sum().cpu()
    return total / (look.q.shape[:1].numel() * length * (look.core.heads // look.core.kv_heads))
