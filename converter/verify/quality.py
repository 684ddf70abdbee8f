"""Quality of a causal language model: perplexity, recall, and agreement with its teacher.

Token-weighted throughout: sums over real tokens in fp64, divided once. Log-softmax is fp32
whatever the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.at_once import one_pass, spans, stretches
from reattend.data import Dataset
from reattend.errors import DataError, GateError
from reattend.report.evidence import QualityRow, Role
from reattend.verify.recall import RecallScore, probes, score
from reattend.verify.scoring import Scorer, cached_scorer, full_scorer, token_nll

__all__ = ["Quality", "agreement", "measure", "perplexity", "recall"]


@dataclass(frozen=True)
class Quality:
    """What was measured, on how many tokens, with which seed.

    Attributes:
        loss: mean nats per predicted token.
        perplexity: exp(loss).
        tokens: predicted tokens in the perplexity.
        recall: by probe name; empty if it was not measured.
        kl: mean over real tokens of KL(teacher || student) in nats; None without a teacher.
        top1: share of real tokens with the teacher's argmax; None without a teacher.
        seed: of the recall probes.
        data: sha256 of the rows.
    """

    loss: float
    perplexity: float
    tokens: int
    recall: dict[str, RecallScore]
    kl: float | None
    top1: float | None
    seed: int
    data: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "recall": {name: value.to_dict() for name, value in self.recall.items()},
            "kl": self.kl,
            "top1": self.top1,
            "seed": self.seed,
            "data": self.data,
        }


def row_of(name: str, role: Role, quality: Quality, cache_bytes: int) -> QualityRow:
    """As it stands in a report."""
    return QualityRow(
        name=name, role=role, cache_bytes_per_token=cache_bytes, ppl=quality.perplexity,
        kl=quality.kl, top1=quality.top1,
        recall={task: score.accuracy for task, score in quality.recall.items()},
        gain={task: score.gain for task, score in quality.recall.items()},
    )  # fmt: skip


def mean_loss(
    scorer: Scorer,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    stretched: nn.Module | None = None,
) -> tuple[float, int]:
    """Mean loss in nats per predicted real token, and the number of such tokens.

    Args:
        scorer: gives the logits of whole rows.
        dataset: token rows; padding is not counted.
        batch_size: rows per forward pass.
        stretched: the model to ask for a stretch of a row at a time, in place of `scorer`, where
            one row's logits are large.

    Raises:
        DataError: no token has a real predecessor.
        GateError: NaN in the loss.
    """
    total, tokens = 0.0, 0
    length = dataset.packed[0].shape[1]
    parts = [(slice(0, length), scorer)]
    if stretched is not None and len(pieces := stretches(stretched, length)) > 1:
        parts = [(part, full_scorer(stretched, part)) for part in pieces]
    for ids_BN, mask_BN in _batches(dataset, batch_size):
        with one_pass(stretched):
            for part, ask in parts:
                known = slice(part.start, part.stop + 1)  # the last token predicts the next stretch
                logits_BNV = ask(ids_BN, mask_BN)
                nll_BM, _, real_BM = token_nll(logits_BNV, ids_BN[:, known], mask_BN[:, known])
                total += float(nll_BM[real_BM].double().sum())
                tokens += int(real_BM.sum())
                del logits_BNV  # before the next are made
    if tokens == 0:
        raise DataError("No token can be predicted from this data.", where=dataset.description)
    return total / tokens, tokens


def perplexity(
    model: nn.Module,
    dataset: Dataset,
    *,
    decode: bool = False,
    chunk: int = 16,
    scorer: Scorer | None = None,
    batch_size: int = 8,
) -> float:
    """exp of the mean loss per real token.

    Args:
        model: causal LM; its training flags are left as they were.
        dataset: token rows; padding is masked and not counted.
        decode: go through the KV cache, `chunk` tokens at a time.
        chunk: with `decode`.
        scorer: another way to get logits (a yardstick's); `model` and `decode` are then unused.
        batch_size: rows per forward pass.
    """
    loss, _ = mean_loss(
        _scorer(model, scorer, decode=decode, chunk=chunk), dataset, batch_size=batch_size
    )
    return _exp(loss)


def recall(
    model: nn.Module,
    dataset: Dataset,
    *,
    seed: int = 0,
    decode: bool = False,
    chunk: int = 16,
    scorer: Scorer | None = None,
    batch_size: int = 8,
) -> dict[str, RecallScore]:
    """The three probes of `reattend.verify.recall`, built from the dataset's full rows.

    Raises:
        DataError: fewer than 2 rows without padding, or rows too short.
    """
    ids_SN, mask_SN = dataset.packed
    chosen = _scorer(model, scorer, decode=decode, chunk=chunk)
    built = probes(ids_SN[mask_SN.bool().all(-1)], seed=seed)
    return {name: score(probe, chosen, batch_size=batch_size) for name, probe in built.items()}


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
    kl, same, tokens = 0.0, 0, 0
    for teacher_BNV, student_BNV, real_BN in _both(teacher, student, dataset, scorer, batch_size):
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
    return {"kl": kl / tokens, "top1": same / tokens}


def _both(
    teacher: nn.Module, student: nn.Module, dataset: Dataset, scorer: Scorer | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits of both models and which tokens are real.

    Where one row's logits are large, a stretch of the row at a time.
    """
    length = dataset.packed[0].shape[1]
    parts = stretches(teacher, length) if scorer is None else [slice(0, length)]
    if len(parts) == 1 or len(stretches(student, length)) == 1:
        parts = [slice(0, length)]
    pieces = len(parts) > 1
    for ids_BN, mask_BN in _batches(dataset, batch_size):
        with one_pass(teacher if pieces else None), one_pass(student if pieces else None):
            for part in parts:
                kept = part if pieces else None
                teacher_BNV = full_scorer(teacher, kept)(ids_BN, mask_BN)
                ask = full_scorer(student, kept) if pieces else _scorer(student, scorer)
                student_BNV = ask(ids_BN, mask_BN).to(teacher_BNV.device)
                yield teacher_BNV, student_BNV, mask_BN[:, part].bool().to(teacher_BNV.device)
                del teacher_BNV, student_BNV


def measure(
    model: nn.Module,
    dataset: Dataset,
    teacher: nn.Module | None = None,
    *,
    recall_data: Dataset | None = None,
    with_recall: bool = True,
    scorer: Scorer | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> Quality:
    """Everything at once.

    Args:
        model: causal LM.
        dataset: held-out rows; never the calibration text.
        teacher: the original, for KL and top-1.
        recall_data: rows for the probes (longer ones say more); None: `dataset`.
        with_recall: False skips the probes (short rows).
        scorer: another way to get the model's logits.
        seed: of the probes.
        batch_size: rows per forward pass.
    """
    chosen = _scorer(model, scorer)
    stretched = model if scorer is None else None
    loss, tokens = mean_loss(chosen, dataset, batch_size=batch_size, stretched=stretched)
    scores: dict[str, RecallScore] = {}
    if with_recall:
        rows = recall_data if recall_data is not None else dataset
        scores = recall(model, rows, seed=seed, scorer=chosen, batch_size=batch_size)
    close: dict[str, float] = {}
    if teacher is not None:
        close = agreement(teacher, model, dataset, scorer=scorer, batch_size=batch_size)
    return Quality(
        loss=loss,
        perplexity=_exp(loss),
        tokens=tokens,
        recall=scores,
        kl=close.get("kl"),
        top1=close.get("top1"),
        seed=seed,
        data=dataset.fingerprint,
    )


def _scorer(
    model: nn.Module, scorer: Scorer | None, *, decode: bool = False, chunk: int = 16
) -> Scorer:
    if scorer is not None:
        return scorer
    return cached_scorer(model, chunk=chunk) if decode else full_scorer(model)


def _batches(dataset: Dataset, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    ids_SN, mask_SN = dataset.packed
    return list(zip(ids_SN.split(batch_size), mask_SN.split(batch_size), strict=True))


def _exp(loss: float) -> float:
    """exp, infinite instead of an overflow."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
