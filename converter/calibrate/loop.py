"""The training loop that every stage shares: AdamW, clipping, schedule, checks, checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reattend.calibrate.checkpoint import Progress, Saver, slots
from reattend.calibrate.schedule import factor, fresh_rate, pace
from reattend.calibrate.shards import is_sharded, whole
from reattend.calibrate.stage import Stage, StageResult
from reattend.calibrate.stream import Batch, Stream, cut
from reattend.errors import TrainingError
from reattend.events import Event, OnEvent

BETAS = (0.9, 0.95)
CLIP = 1.0
CHECKPOINTS = 10
POINTS = 200


class Loop:
    """One stage from its first (or last saved) step to the end of its budget.

    Args:
        stage: what computes losses and gradients.
        stream: where batches come from.
        budget: real tokens of this stage.
        lr: peak learning rate; None takes the stage's own, times the `pace` of each group.
        saver: where checkpoints go: one per tenth of the budget.
        on_event: told after every step, never inside a durable write.
        part: the shares of the whole training at which this stage begins and ends.
    """

    def __init__(
        self, stage: Stage, stream: Stream, budget: int, lr: float | None, saver: Saver,
        on_event: OnEvent | None, part: tuple[float, float] = (0.0, 1.0),
    ) -> None:  # fmt: skip
        self.part = part
        self.stage, self.stream, self.budget = stage, stream, budget
        self.lr, self.paced = lr or stage.lr, lr is None
        self.saver, self.on_event = saver, on_event
        self.parameters = stage.parameters
        steps = budget / stream.mean_tokens
        self.peak = {False: self.lr, True: fresh_rate(self.lr, steps) if self.paced else self.lr}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.parameters[n] for n in some], "group": group, "fresh": new}
                for group, names in stage.groups.items()
                for new in (False, True)
                if (some := [n for n in names if (n in stage.fresh) == new])
            ],
            lr=self.lr, betas=BETAS, weight_decay=0.0,
        )  # fmt: skip
        for parameter in self.parameters.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.progress = Progress()
        self.every = max(1, int(budget / stream.mean_tokens) // POINTS)

    def run(self, position: int) -> StageResult:
        """Train; `position` is the first batch of the stream this stage reads.

        Raises:
            TrainingError: NaN or infinity in a loss, a gradient or a weight.
        """
        self.progress.position = position
        self._restore()
        saved, reused = self._tenth(), self.progress.complete
        if reused:
            self._tell("reused from the interrupted run")
        if not self.progress.complete:
            for batch in self.stream.batches(self.progress.position):
                self._step(cut(batch, self.budget - self.progress.tokens))
                self.progress.complete = self.progress.tokens >= self.budget
                if self.progress.complete:
                    self._close_window()
                if self.progress.complete or self._tenth() > saved:
                    saved = self._tenth()
                    self.saver.save(self.parameters, self.optimizer, self.progress)
                self._tell()
                if self.progress.complete:
                    break
        self.stage.close()
        p = self.progress
        sites = {g: (p.first[g], p.last[g]) for g in p.first}
        return StageResult(self.stage.name, p.tokens, p.points, self.stage.loss_name, sites, reused)

    def _step(self, batch: Batch) -> None:
        p, ranks = self.progress, self.stage.ranks
        for parameter in self.parameters.values():
            parameter.grad = None
        inputs, silent = ranks.share(batch)
        if p.step == 0 and self.stage.anneals:
            # how far there is to go, which the first step does not show
            self.stage.trained(1.0)
            far = self.stage.accumulate(inputs, silent)
            p.first = {group: float(loss) for group, loss in far.items()}
            for parameter in self.parameters.values():
                parameter.grad = None
        begin, end = self.part
        self.stage.trained(begin + (end - begin) * p.tokens / self.budget)
        losses = {g: float(v) for g, v in self.stage.accumulate(inputs, silent).items()}
        for group, loss in losses.items():
            if not math.isfinite(loss):
                raise self._broken(self.stage.blame(group), f"the loss is {loss}")
        ranks.sum_gradients(list(self.parameters.values()))
        for group, names in self.stage.groups.items():
            self._clip(group, [self.parameters[n] for n in names], losses.get(group, 0.0))
        self._record(losses)
        middle = (p.tokens + 0.5 * batch.tokens) / self.budget
        for options in self.optimizer.param_groups:
            peak = self.peak[options["fresh"]]
            options["lr"] = peak * factor(middle) * self._pace(options["group"])
        self.optimizer.step()
        self._check_weights()
        p.step, p.tokens, p.position = p.step + 1, p.tokens + batch.tokens, p.position + 1
        if p.step == 1 or p.step % self.every == 0:
            self._close_window()

    def _pace(self, group: str) -> float:
        """Share of the stage's learning rate that a group's start deserves."""
        first = self.progress.first.get(group)
        return pace(first, self.stage.far) if self.paced and first is not None else 1.0

    def _clip(self, group: str, parameters: list[nn.Parameter], loss: float) -> None:
        """Clip a group's gradient to norm 1; drop it where the loss is only rounding."""
        gradients = [q.grad for q in parameters if q.grad is not None]
        if not gradients:
            return
        norm = _norm(gradients)
        if not math.isfinite(norm):
            raise self._broken(self._culprit(group, parameters), f"the gradient norm is {norm}")
        if loss < self.stage.floor:
            for q in parameters:
                q.grad = None
        elif norm > CLIP:
            for gradient in gradients:
                gradient.mul_(CLIP / norm)

    def _culprit(self, group: str, parameters: list[nn.Parameter]) -> str:
        names = {id(q): n for n, q in self.parameters.items()}
        bad = (
            q for q in parameters if q.grad is not None and not bool(whole(q.grad).isfinite().all())
        )
        return next((names[id(q)] for q in bad), group)

    def _check_weights(self) -> None:
        weights: list[Tensor] = [q.detach() for q in self.parameters.values()]
        if math.isfinite(_norm(weights)):
            return
        bad = (n for n, q in self.parameters.items() if not bool(whole(q).isfinite().all()))
        raise self._broken(next(bad, "sum of all weights"), "a weight is NaN or infinite")

    def _broken(self, site: str, why: str) -> TrainingError:
        return TrainingError(
            "calibration met NaN or infinity; nothing was changed",
            where=f"stage {self.stage.name}, step {self.progress.step + 1}, site {site}",
            why=why,
            next_step=f"lower calibrate.lr (it is {self.lr:g}) and check the weights of this site",
        )

    def _record(self, losses: dict[str, float]) -> None:
        p = self.progress
        for group, loss in losses.items():
            p.first.setdefault(group, loss)
            p.last[group] = loss if group not in p.last else 0.9 * p.last[group] + 0.1 * loss
        mean = sum(losses.values()) / max(1, len(losses))
        p.window = (p.window[0] + mean, p.window[1] + 1)

    def _close_window(self) -> None:
        total, count = self.progress.window
        if count:
            self.progress.points.append((self.progress.tokens, total / count))
            self.progress.window = (0.0, 0)

    def _tenth(self) -> int:
        return self.progress.tokens * CHECKPOINTS // self.budget

    def _tell(self, message: str = "") -> None:
        if self.on_event is None or not self.stage.ranks.main:
            return
        p = self.progress
        loss = sum(p.last.values()) / max(1, len(p.last))
        self.on_event(
            Event(
                self.stage.name, done=min(p.tokens, self.budget), total=self.budget,
                message=message, values={"loss": loss, "step": p.step},
            )
        )  # fmt: skip

    def _restore(self) -> None:
        """Continue at rank 0's checkpoint; without one, start where rank 0 starts."""
        ranks = self.stage.ranks
        found = self.saver.load(self.parameters, self.optimizer) if ranks.main else None
        stored: dict[str, Tensor] = {}
        if found is not None:
            self.progress, stored = found
        p = self.progress
        numbers = torch.tensor(
            [p.step, p.tokens, p.position, int(p.complete), int(found is not None)]
        )
        ranks.same([numbers])
        groups = list(self.stage.groups)
        for losses in (p.first, p.last):
            told = torch.tensor([losses.get(g, math.nan) for g in groups], dtype=torch.float64)
            ranks.same([told])
            losses |= {g: v for g, v in zip(groups, told.tolist(), strict=True) if v == v}
        p.step, p.tokens, p.position = (int(v) for v in numbers[:3])
        p.complete = bool(numbers[3])
        if bool(numbers[4]):
            for name, target in slots(self.parameters, self.optimizer, p.complete).items():
                ranks.give(target, stored.pop(name, None))
        else:
            ranks.same(q for q in self.parameters.values() if not is_sharded(q))


def _norm(tensors: list[Tensor]) -> float:
    """Euclidean norm of all of them together; sharded or not, the same in every process."""
    plain = [t for t in tensors if not is_sharded(t)]
    shared = [t for t in tensors if is_sharded(t)]
    parts = [whole(torch.nn.utils.get_total_norm(some)) for some in (plain, shared) if some]
    return math.hypot(*(float(part) for part in parts))
