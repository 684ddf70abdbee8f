"""`calibrate`: the stages in order, on working copies, and the result back into the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from reattend.calibrate.checkpoint import Saver
from reattend.calibrate.end_to_end import EndToEnd
from reattend.calibrate.language_model import LanguageModel
from reattend.calibrate.layerwise import Layerwise
from reattend.calibrate.loop import Loop
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.relations import Relations
from reattend.calibrate.stage import Stage, StageResult
from reattend.calibrate.stream import Stream
from reattend.calibrate.working import Working, working_copies, write_back
from reattend.data import Dataset
from reattend.errors import ArgumentError, DataError
from reattend.events import OnEvent
from reattend.mixers.base import Mixer
from reattend.mixers.dense import DenseAttention
from reattend.plan_sections import Calibrate
from reattend.workdir import Workdir, digest

__all__ = ["StageResult", "budgets", "calibrate"]

STAGES: dict[str, type[Stage]] = {"layerwise": Layerwise, "end-to-end": EndToEnd}
# Split and learning rates: chosen on rows of the shipped model's calibration text that were not
# trained on (examples/recovery.py shows the result on held-out text).
SHARE = {"layerwise": 0.3, "end-to-end": 0.7}


def calibrate(
    teacher: nn.Module,
    student: nn.Module,
    dataset: Dataset,
    settings: Calibrate,
    *,
    seed: int,
    workdir: Workdir | None = None,
    inputs_hash: str = "",
    on_event: OnEvent | None = None,
    around: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    originals: Callable[[nn.Module], Mapping[str, DenseAttention]] | None = None,
) -> list[StageResult]:
    """Train `student`, on its distance to `teacher` unless `settings.loss` says otherwise.

    The student's mixers and their output projections change, nothing else does.

    All computation is in float32 (float64 where the models are), whatever dtype they are stored
    in; at the end the trained weights are rounded to the student's dtype, as new parameters.
    Until then `student` is untouched: an error or a kill leaves it as it was. The same models,
    data, settings, seed and thread count give the same bytes on one machine type, also when the
    run was killed and resumed in between.

    The dense model is calibrated by the same call with an identity-converted student; where the
    loss is the distance to the teacher, it starts and stays at zero.

    Args:
        teacher: the original model.
        student: the converted one; may share unconverted parameters with the teacher.
        dataset: training rows; repeated with reshuffling if shorter than `settings.tokens`.
        settings: the plan's `calibrate` section.
        seed: order of the rows and initial LoRA factors; `settings.seed` wins over it.
        workdir: where checkpoints go; None keeps none. With several processes (`WORLD_SIZE`
            above 1) only rank 0 may have one.
        inputs_hash: hash of everything that decides teacher and student.
        on_event: told after every step; may raise to stop.
        around: what to enter around each stage, by its name.
        originals: normal forms of a teacher's blocks by path; `settings.relations` needs them.

    Returns:
        One result per stage.

    Raises:
        TrainingError: NaN or infinity in a loss, gradient or weight; names stage, step, site.
        ModelError: the teacher itself produces NaN or infinity.
        DataError: the data has no token.
        ArgumentError: no mixer in the student, the models do not belong together, `loss: lm`
            for a model that is no causal language model, or the environment asks for a form of
            FSDP that is not supported.
        MissingExtraError: `lora_rank` without peft.
        OutputError: a checkpoint cannot be written or read.
    """
    if not settings.trains:
        return []
    if dataset.tokens == 0:
        raise DataError("there is no token to calibrate on", where=dataset.description)
    seed = seed if settings.seed is None else settings.seed
    ranks = Ranks(next(student.parameters()).device)
    if ranks.sharded and "end-to-end" in settings.stages[:-1]:
        raise ArgumentError(
            "under FSDP end-to-end must be the last stage",
            where="calibrate.stages",
            why="its blocks are spread over the processes, and layerwise needs them whole",
            next_step="calibrate with stages: [layerwise, end-to-end]",
        )
    tied = [m for m in student.modules() if isinstance(m, Mixer) and m.reads]
    if ranks.sharded and tied:
        raise ArgumentError(
            "blocks that read other blocks cannot be trained under FSDP",
            where=f"the one that reads {tied[0].reads}",
            why="every block is gathered for its own call only",
            next_step="train with ACCELERATE_USE_FSDP=false, or in one process",
        )
    stream = Stream(dataset, settings.batch_size, seed)
    results: list[StageResult] = []
    position = 0
    processes = [ranks.world, "sharded"] if ranks.sharded else ranks.world
    key = digest(
        [inputs_hash, settings.model_dump(mode="json"), seed, dataset.fingerprint, processes]
    )
    working: Working | None = None
    with _own_random_state(seed):
        spent, total = 0, settings.tokens
        for name, budget in budgets(settings).items():
            part = (spent / total, (spent + budget) / total)
            spent += budget
            with around(name):
                working = working or _prepared(teacher, student, settings)
                stage = _stage(name, settings, working, ranks, originals)
                saver = Saver(workdir, name, digest([key, name, budget]))
                loop = Loop(stage, stream, budget, settings.lr, saver, on_event, part)
                results.append(loop.run(position))
                position = loop.progress.position
        assert working is not None
        if settings.lora_rank is not None:
            from reattend.calibrate.lora import merge

            merge(working)
    write_back(student, working)
    return results


def _stage(
    name: str, settings: Calibrate, working: Working, ranks: Ranks,
    originals: Callable[[nn.Module], Mapping[str, DenseAttention]] | None,
) -> Stage:  # fmt: skip
    if name == "layerwise" and settings.relations:
        if originals is None:
            raise ArgumentError("relations need the original's blocks", where="originals")
        return Layerwise(working, ranks, Relations(settings, originals(working.teacher)))
    made = LanguageModel if settings.loss == "lm" else STAGES[name]
    return made(working, ranks)


def _prepared(teacher: nn.Module, student: nn.Module, settings: Calibrate) -> Working:
    """Working copies, with LoRA factors where the plan wants them."""
    working = working_copies(teacher, student)
    if settings.lora_rank is not None:
        from reattend.calibrate.lora import inject

        inject(working, settings.lora_rank)
    return working


def budgets(settings: Calibrate) -> dict[str, int]:
    """Tokens of each stage, in order; together `settings.tokens`."""
    total = sum(SHARE[name] for name in settings.stages)
    left = settings.tokens
    found: dict[str, int] = {}
    for name in settings.stages[:-1]:
        found[name] = max(1, round(settings.tokens * SHARE[name] / total))
        left -= found[name]
    found[settings.stages[-1]] = max(1, left)
    return found


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """Seed torch inside, restore the caller's state after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
