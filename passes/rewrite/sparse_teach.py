"""`finder: gate`: trains what selects keys in a block, by the attention that the block itself pays.

After SeerAttention, Gao et al., arXiv 2410.13276: all weights are frozen but the selector's; AdamW
at 1e-3 with warm-up and a cosine, no decay. Inputs are rows of the original model's own stream, so
layers are trained apart, one after another. What each kind learns from a row is its lesson
(`sparse_gate` and its neighbours). What differs: the warm-up is a twentieth of the steps, and the
last eighth of the rows is not trained on but measured.

Nothing here depends on chance other than a generator of its own: equal rows give equal weights.

Layout letters: n tokens of a text, J query heads of a KV head, R queries at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from reattend.calibrate.schedule import factor
from reattend.errors import DataError, TrainingError
from reattend.mixers.base import Context
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern, per_head
from reattend.mixers.selecting.base import Learner, products
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import SparseConfig
from reattend.parts import query_heads
from reattend.statistics import TEXT_ROWS

LEARNING_RATE = 1e-3
#: Texts per step, and queries whose attention is formed at a time.
BATCH, QUERIES = 4, 256


class Lesson(Protocol):
    """What one row teaches.

    Attributes:
        measure: what the loss is, for the report: `kl`.
        unit: its unit.
    """

    measure: ClassVar[str]
    unit: ClassVar[str]

    def loss(self, student: Any) -> Tensor:
        """Of a method, differentiable."""
        ...


@dataclass(frozen=True)
class Watched:
    """A row of the block's input, as a class of its heads sees it.

    `core` is that of these heads, `sinks_H11` their logits.
    """

    q_HNd: Tensor
    k_GNd: Tensor
    v_GNe: Tensor
    core: CoreConfig
    sinks_H11: Tensor | None

    def probabilities(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Of each KV head and some queries at a time: what its heads pay to every key [J, R, n]."""
        group = self.core.heads // self.core.kv_heads
        one = self.core.model_copy(update={"heads": group, "kv_heads": 1})
        n = self.k_GNd.shape[1]
        j = torch.arange(n, device=self.k_GNd.device)
        for g in range(self.core.kv_heads):
            own = slice(g * group, (g + 1) * group)
            for begin in range(0, n, QUERIES):
                rows = slice(begin, min(begin + QUERIES, n))
                s = products(self.q_HNd[None, own, rows], self.k_GNd[None, g : g + 1], one)[0]
                s = s.masked_fill(~own_pattern(one, j[rows, None], j), float("-inf"))
                if self.sinks_H11 is not None:
                    s = torch.cat([s, self.sinks_H11[own].expand(-1, s.shape[1], 1)], -1)
                yield g, rows, s.softmax(-1)[..., :n]


@torch.no_grad()
def watched(mixer: SparseAttention, x_ND: Tensor, kv_heads: tuple[int, ...]) -> Watched:
    """Float32 or wider."""
    like, core = mixer.q_proj.weight, mixer.config.core
    x = x_ND[None].to(like)
    q, new = mixer.project(x, x, Context(), None)
    heads = query_heads(core, kv_heads)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    sinks = per_head(mixer.sinks)
    return Watched(
        q[0, heads].to(wide), new.keys[0, list(kv_heads)].to(wide),
        new.values[0, list(kv_heads)].to(wide),
        core.model_copy(update={"heads": len(heads), "kv_heads": len(kv_heads)}),
        None if sinks is None else sinks[heads].to(wide),
    )  # fmt: skip


def taught(mixer: SparseAttention, texts: list[Tensor] | None, steps: int) -> dict[str, Any]:
    """Start the selectors of a mixer and train them; what the report says of it.

    Args:
        mixer: its selectors are changed.
        texts: rows of the block's input [n, D]; None leaves them at their start.
        steps: of training.

    Raises:
        DataError: the rows are too short to teach anything.
        TrainingError: the loss is not a number.
    """
    found: dict[str, Any] = {}
    for number, c in enumerate(mixer.config.classes):
        method = mixer.selecting[str(number)] if c.pattern.select is not None else None
        if c.pattern.select is None or not isinstance(method, Learner):
            continue
        method.start()
        kind = c.pattern.select.kind
        name = f"{kind}_parameters".replace("-", "_")
        found[name] = found.get(name, 0) + sum(p.numel() for p in method.parameters())
        if texts:
            lessons = [x for x in _lessons(mixer, texts, c.kv_heads, method) if x is not None]
            told = _train(method, lessons, steps)
            name = f"{kind}_{lessons[0].measure}".replace("-", "_")
            found[name] = f"{found[name]}; {told}" if name in found else told
    return found


def _lessons(
    mixer: SparseAttention, texts: list[Tensor], kv_heads: tuple[int, ...], method: Learner
) -> list[Any]:
    """What each row teaches this method; None where it is too short."""
    from reattend.mixers.selecting.gate import GateMethod
    from reattend.mixers.selecting.low_rank import LowRankMethod
    from reattend.mixers.selecting.segments import SegmentsMethod
    from reattend.passes.rewrite import sparse_boundaries, sparse_gate, sparse_guess, sparse_values

    if isinstance(method, GateMethod):
        return [sparse_gate.lesson(mixer, x, kv_heads, method.block) for x in texts]
    if isinstance(method, SegmentsMethod):
        window = method.selector.window
        return [sparse_boundaries.lesson(mixer, x, kv_heads, window) for x in texts]
    if isinstance(method, LowRankMethod):
        tokens = method.selector.tokens
        return [sparse_guess.lesson(mixer, x, kv_heads, tokens) for x in texts]
    return [sparse_values.lesson(mixer, x, kv_heads) for x in texts]


def _train(method: Learner, lessons: Sequence[Lesson], steps: int) -> str:
    """The loss before and after, in words."""
    if not lessons:
        raise DataError(
            "the calibration rows are too short to train a selector on",
            where="finder: gate",
            why="a row teaches something where its queries have several blocks to choose from",
            next_step="raise calibrate.seq_len, or give the selector smaller blocks",
        )
    measured = lessons[-max(1, len(lessons) // 8) :]
    trained = lessons[: len(lessons) - len(measured)] or lessons
    wide = next(t for t in vars(trained[0]).values() if isinstance(t, Tensor)).dtype
    student = copy.deepcopy(method).to(wide).requires_grad_()
    before = _mean(student, measured)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            while len(order) < BATCH:
                order += torch.randperm(len(trained), generator=generator).tolist()
            batch, order = order[:BATCH], order[BATCH:]
            for options in optimizer.param_groups:
                options["lr"] = LEARNING_RATE * factor((step + 0.5) / steps)
            optimizer.zero_grad()
            for number in batch:
                loss = trained[number].loss(student) / BATCH
                if not bool(torch.isfinite(loss)):
                    raise TrainingError(
                        "training a selector diverged: the loss is not a number",
                        where=f"finder: gate, step {step}",
                        next_step="convert in float32, or lower `steps`",
                    )
                loss.backward()
            optimizer.step()
    method.load_state_dict(student.state_dict())
    where = "rows not trained on" if len(trained) < len(lessons) else "row trained on"
    after, unit = _mean(student, measured), trained[0].unit
    return f"{before:.4f} -> {after:.4f} {unit} on {len(measured)} {where}"


@torch.no_grad()
def _mean(method: Learner, lessons: Sequence[Lesson]) -> float:
    return float(torch.stack([x.loss(method) for x in lessons]).mean())


def effort(config: SparseConfig, steps: int, length: int) -> tuple[float, float]:
    """Floating-point operations and bytes of `taught`, on as many texts as statistics hold."""
    core, work, held = config.core, 0.0, 0.0
    group = core.heads // core.kv_heads
    for c in config.classes:
        if c.pattern.select is not None and c.pattern.select.trained:
            heads = len(c.kv_heads)
            maps, numbers = c.pattern.select.lesson(length, core)
            # a probability is about as much work as a product over 8 numbers
            attention = 2.0 * heads * group * length**2 * (core.qk_head_dim + 8)
            work += TEXT_ROWS * attention + 6.0 * steps * BATCH * length * heads * maps
            held += 4.0 * TEXT_ROWS * length * heads * numbers
    return work, held
