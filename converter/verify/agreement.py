"""How close a model's answers are to its original's, and what they lose on a text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from reattend.at_once import one_pass, spans, stretches
from reattend.data import Dataset
from reattend.errors import DataError, GateError
from reattend.verify.scoring import Scorer, full_scorer, token_nll


class Loss:
    """Nats over predicted real tokens, summed."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    def add(self, logits_BNV: Tensor, ids_BN: Tensor, mask_BN: Tensor, part: slice) -> None:
        """A stretch of rows; its last token predicts the first of the next."""
        known = slice(part.start, part.stop + 1)
        nll_BM, _, real_BM = token_nll(logits_BNV, ids_BN[:, known], mask_BN[:, known])
        self.total += float(nll_BM[real_BM].double().sum())
        self.tokens += int(real_BM.sum())

    def mean(self, dataset: Dataset) -> tuple[float, int]:
        """Nats per token, and how many.

        Raises:
            DataError: none.
        """
        if self.tokens == 0:
            raise DataError("No token can be predicted from this data.", where=dataset.description)
        return self.total / self.tokens, self.tokens


def agreement(
    teacher: nn.Module,
    student: nn.Module,
    dataset: Dataset,
    *,
    scorer: Scorer | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """How closely the student's predictions follow the teacher's.

    Args:
        teacher: the original.
        student: the converted model.
        dataset: token rows; padding is not counted.
        scorer: another way to get the student's logits.
        batch_size: rows per forward pass.

    Returns:
        `kl`: mean KL(teacher || student) in nats per real token; `top1`: share of equal argmax.

    Raises:
        GateError: the result is not a number.
    """
    return compared(teacher, student, dataset, scorer, batch_size)[1]


def compared(
    teacher: nn.Module, student: nn.Module, dataset: Dataset, scorer: Scorer | None, batch_size: int
) -> tuple[Loss, dict[str, float]]:
    """The student's loss, and `agreement`, in one pass of each model."""
    loss, kl, same, tokens = Loss(), 0.0, 0, 0
    for teacher_BNV, student_BNV, ids_BN, mask_BN, stretch in _both(
        teacher, student, dataset, scorer, batch_size
    ):
        loss.add(student_BNV, ids_BN, mask_BN, stretch)
        real_BN = mask_BN[:, stretch].bool().to(teacher_BNV.device)
        for teacher_NV, student_NV, real_N in zip(teacher_BNV, student_BNV, real_BN, strict=True):
            for part in spans(*teacher_NV.shape):
                real = real_N[part]
                target_RV = teacher_NV[part][real].float().log_softmax(-1)
                guess_RV = student_NV[part][real].float().log_softmax(-1)
                same += int((target_RV.argmax(-1) == guess_RV.argmax(-1)).sum())
                torch.sub(target_RV, guess_RV, out=guess_RV)  # in place: each is megabytes
                kl += float(guess_RV.mul_(target_RV.exp_()).sum(-1).double().sum())
            tokens += int(real_N.sum())
        del teacher_BNV, student_BNV, teacher_NV, student_NV  # before the next are made
    if tokens == 0:
        raise DataError("The data has no real token.", where=dataset.description)
    if math.isnan(kl):
        raise GateError("Teacher and student cannot be compared.", why="NaN in the divergence")
    return loss, {"kl": kl / tokens, "top1": same / tokens}


def _both(
    teacher: nn.Module, student: nn.Module, dataset: Dataset, scorer: Scorer | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, slice]]:
    """Logits of both models, the whole rows and their masks, and which tokens the logits are of.

    Where one row's logits are large, a stretch of the row at a time.
    """
    length = dataset.packed[0].shape[1]
    parts = stretches(teacher, length) if scorer is None else [slice(0, length)]
    if len(parts) == 1 or len(stretches(student, length)) == 1:
        parts = [slice(0, length)]
    pieces = len(parts) > 1
    for ids_BN, mask_BN in batches(dataset, batch_size):
        with one_pass(teacher if pieces else None), one_pass(student if pieces else None):
            for part in parts:
                kept = part if pieces else None
                teacher_BNV = full_scorer(teacher, kept)(ids_BN, mask_BN)
                ask = scorer or full_scorer(student, kept)
                student_BNV = ask(ids_BN, mask_BN).to(teacher_BNV.device)
                yield teacher_BNV, student_BNV, ids_BN, mask_BN, part
                del teacher_BNV, student_BNV


def batches(dataset: Dataset, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and masks of some rows at a time."""
    ids_SN, mask_SN = dataset.packed
    return list(zip(ids_SN.split(batch_size), mask_SN.split(batch_size), strict=True))
