"""Quality of a causal language model: perplexity, recall, and agreement with its teacher.

Token-weighted throughout: sums over real tokens in fp64, divided once. Log-softmax is fp32
whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reattend.at_once import one_pass, stretches
from reattend.data import Dataset
from reattend.report.evidence import QualityRow, Role
from reattend.verify.agreement import Loss, agreement, batches, compared
from reattend.verify.recall import RecallScore, probes, score
from reattend.verify.scoring import Scorer, cached_scorer, full_scorer

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
    found = Loss()
    length = dataset.packed[0].shape[1]
    parts = [(slice(0, length), scorer)]
    if stretched is not None and len(pieces := stretches(stretched, length)) > 1:
        parts = [(part, full_scorer(stretched, part)) for part in pieces]
    for ids_BN, mask_BN in batches(dataset, batch_size):
        with one_pass(stretched):
            for part, ask in parts:
                found.add(ask(ids_BN, mask_BN), ids_BN, mask_BN, part)
    return found.mean(dataset)


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
    close: dict[str, float] = {}
    if teacher is None:
        loss, tokens = mean_loss(chosen, dataset, batch_size=batch_size, stretched=stretched)
    else:
        found, close = compared(teacher, model, dataset, scorer, batch_size)
        loss, tokens = found.mean(dataset)
    scores: dict[str, RecallScore] = {}
    if with_recall:
        rows = recall_data if recall_data is not None else dataset
        scores = recall(model, rows, seed=seed, scorer=chosen, batch_size=batch_size)
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


def _exp(loss: float) -> float:
    """exp, infinite instead of an overflow."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
