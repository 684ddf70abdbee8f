"""`finder: gate`: trains what selects keys in a block, by the attention that the block itself pays.

After SeerAttention, Gao et al., arXiv 2410.13276: all weights are frozen but the selector's; AdamW
at 1e-3 with warm-up and a cosine, no decay. Inputs are rows of the original model's own stream, so
layers are trained apart, one after another. What each kind learns from a row is its lesson
(`sparse_gate` and its neighbours). What differs: the warm-up is a twentieth of the steps, and the
last eighth of the rows is not trained on but measured.

Nothing here depends on chance other than a generator of its own: equal rows give equal weights.

Layout letters: n tokens of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from reattend.calibrate.schedule import factor
from reattend.errors import DataError, TrainingError
from reattend.mixers.selecting.base import Learner
from reattend.mixers.selecting.gate import GateMethod
from reattend.mixers.selecting.low_rank import LowRankMethod
from reattend.mixers.selecting.segments import SegmentsMethod
from reattend.mixers.selecting.values import ValuesMethod
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import SparseConfig
from reattend.passes.rewrite import sparse_boundaries, sparse_gate, sparse_guess, sparse_values
from reattend.passes.rewrite.sparse_baseline import BEHIND, compared, stated
from reattend.passes.rewrite.sparse_view import width_of
from reattend.statistics import TEXT_ROWS

LEARNING_RATE = 1e-3
#: Texts per step.
BATCH = 4


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


#: What a row [n, D] teaches each kind of method, for these KV heads; None: it is too short.
LESSONS: dict[type[Learner], Callable[[SparseAttention, Tensor, tuple[int, ...], Any], Any]] = {
    GateMethod: sparse_gate.lesson,
    SegmentsMethod: sparse_boundaries.lesson,
    ValuesMethod: sparse_values.lesson,
    LowRankMethod: sparse_guess.lesson,
}


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
            made = [(x, LESSONS[type(method)](mixer, x, c.kv_heads, method)) for x in texts]
            lessons = [lesson for _, lesson in made if lesson is not None]
            words = _train(method, lessons, steps, width_of(mixer))
            told = {f"{kind}_{lessons[0].measure}".replace("-", "_"): words}
            apart = [x for x, lesson in made if lesson is not None][-_measured(lessons) :]
            if (sides := compared(mixer, apart, c, method)) is not None:
                told |= stated(*sides)
            for name, words in told.items():
                more = name in found and name != BEHIND
                found[name] = f"{found[name]}; {words}" if more else words
    return found


def _measured(lessons: Sequence[Lesson]) -> int:
    """How many of them, the last ones, are not trained on unless there is but one."""
    return max(1, len(lessons) // 8)


def _train(method: Learner, lessons: Sequence[Lesson], steps: int, wide: torch.dtype) -> str:
    """The loss before and after, in words."""
    if not lessons:
        raise DataError(
            "the calibration rows are too short to train a selector on",
            where="finder: gate",
            why="a row teaches something where its queries have several blocks to choose from",
            next_step="raise calibrate.seq_len, or give the selector smaller blocks",
        )
    measured = lessons[-_measured(lessons) :]
    trained = lessons[: len(lessons) - len(measured)] or lessons
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
    return f"{before:.4g} -> {after:.4g} {unit} on {len(measured)} {where}"


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
