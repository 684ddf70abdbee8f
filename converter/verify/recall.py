"""Recall: can the model still find what it read earlier in the row?

Averages such as perplexity hide the loss of this ability, so it is measured on its own. Probes are
built from rows of token ids alone, no tokenizer and no language needed:

- `copy`: the last third of the row repeats the first third, so the source lies two thirds of the
  row back; scored on the repetition without its first token, whose place nothing announces.
- `passkey`: a marker and a key of random tokens stand somewhere in the first half; the marker comes
  again at the end, and the key is scored.
- `multi_key`: several such pairs, whose markers begin alike, stand in the first three quarters; one
  of them is asked at the end.

A small model may find keys only in part. So each score has a control: the loss on the same key
without the earlier occurrence. `gain` is what the memory is worth in nats per token; it falls to
zero for a model that cannot look back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from reattend.errors import DataError
from reattend.verify.scoring import Scorer, token_nll

MARKER, KEY, PAIRS, POOL = 8, 8, 4, 512
LENGTH = 2 * PAIRS * (MARKER + KEY)  # tokens a row must have
TOKENS = MARKER // 2 + PAIRS * (MARKER - MARKER // 2 + KEY)  # different tokens, all rows together


@dataclass(frozen=True)
class RecallScore:
    """One recall number. Losses in nats per token; accuracy is teacher-forced argmax."""

    accuracy: float
    loss: float
    control_loss: float
    tokens: int

    @property
    def gain(self) -> float:
        """Nats per token that the earlier occurrence is worth."""
        return self.control_loss - self.loss

    def to_dict(self) -> dict[str, float | int]:
        """Fields and gain, for JSON."""
        return {**asdict(self), "gain": self.gain}


@dataclass(frozen=True)
class Probe:
    """Rows to score.

    Attributes:
        name: `copy`, `passkey` or `multi_key`.
        ids: (S, N) token ids.
        control: (S, N) the same without the earlier occurrence.
        target: (S, N) boolean: the tokens that count.
    """

    name: str
    ids: Tensor
    control: Tensor
    target: Tensor


def lacking(rows_SN: Tensor) -> str:
    """What these full rows lack to carry the probes; empty if nothing."""
    rows, length = rows_SN.shape
    if length < LENGTH or rows < 2:
        return (
            f"{rows} rows of {length} tokens; needed: 2 rows of {LENGTH} (twice {PAIRS} pairs "
            f"of a marker of {MARKER} and a key of {KEY})"
        )
    kinds = int((torch.bincount(rows_SN.flatten()) > 0).sum())
    return f"{kinds} different tokens; needed: {TOKENS}" if kinds < TOKENS else ""


def probes(rows_SN: Tensor, *, seed: int = 0) -> dict[str, Probe]:
    """The three probes over the same full rows.

    Args:
        rows_SN: token ids without padding; at least 128 tokens per row, 2 rows.
        seed: of keys, markers and places.

    Raises:
        DataError: rows too few, too short, or of too few different tokens.
    """
    if why := lacking(rows_SN):
        raise DataError(
            "The rows are too small to measure recall.",
            why=why,
            next_step=f"use seq_len={LENGTH} or more, and ordinary text.",
        )
    return {
        "copy": _copy(rows_SN),
        "passkey": _keyed(rows_SN, "passkey", pairs=1, span=0.5, seed=seed),
        "multi_key": _keyed(rows_SN, "multi_key", pairs=PAIRS, span=0.75, seed=seed + 1),
    }


def score(probe: Probe, scorer: Scorer, *, batch_size: int = 8) -> RecallScore:
    """Accuracy and loss on the probe's target tokens, and the loss on its control."""
    right, loss, tokens = _sums(probe.ids, probe.target, scorer, batch_size)
    _, control, _ = _sums(probe.control, probe.target, scorer, batch_size)
    return RecallScore(right / tokens, loss / tokens, control / tokens, tokens)


def _sums(
    ids_SN: Tensor, target_SN: Tensor, scorer: Scorer, batch_size: int
) -> tuple[int, float, int]:
    """Right tokens, summed loss in nats, and counted tokens."""
    right, loss, tokens = 0, 0.0, 0
    for ids_BN, target_BN in zip(
        ids_SN.split(batch_size), target_SN.split(batch_size), strict=True
    ):
        every_BN = torch.ones_like(ids_BN)
        nll_BM, right_BM, _ = token_nll(scorer(ids_BN, every_BN), ids_BN, every_BN)
        chosen_BM = target_BN[:, 1:].to(nll_BM.device)
        right += int(right_BM[chosen_BM].sum())
        loss += float(nll_BM[chosen_BM].double().sum())
        tokens += int(chosen_BM.sum())
    return right, loss, tokens


def _copy(rows_SN: Tensor) -> Probe:
    """The last third repeats the first; the control begins with another row's first third."""
    third = rows_SN.shape[1] // 3
    ids_SN, control_SN = rows_SN.clone(), rows_SN.clone()
    ids_SN[:, -third:] = control_SN[:, -third:] = rows_SN[:, :third]
    control_SN[:, :third] = rows_SN[:, :third].roll(1, dims=0)
    target_SN = torch.zeros_like(rows_SN, dtype=torch.bool)
    target_SN[:, -third + 1 :] = True
    return Probe("copy", ids_SN, control_SN, target_SN)


def _keyed(rows_SN: Tensor, name: str, *, pairs: int, span: float, seed: int) -> Probe:
    """Rows with `pairs` marker-key pairs in the first `span`, one of them asked at the end.

    Markers and keys are distinct tokens among the most frequent of the rows: rare tokens measure
    how well the embedding of a rare token was trained, not memory.
    """
    generator = torch.Generator().manual_seed(seed)
    counts_V = torch.bincount(rows_SN.flatten())
    ranked_V = counts_V.argsort(descending=True, stable=True)
    pool = ranked_V[: min(POOL, int((counts_V > 0).sum()))]
    shared, own, size = MARKER // 2, MARKER - MARKER // 2, MARKER + KEY
    needed = shared + pairs * (own + KEY)
    ids_SN, target_SN = rows_SN.clone(), torch.zeros_like(rows_SN, dtype=torch.bool)
    slot = int(rows_SN.shape[1] * span) // pairs
    control_SN = rows_SN.clone()
    for row in range(len(rows_SN)):
        drawn = pool[torch.randperm(len(pool), generator=generator)[:needed]]
        head, rest = drawn[:shared], drawn[shared:].view(pairs, own + KEY)
        for pair in range(pairs):
            at = slot * pair + int(torch.randint(0, slot - size + 1, (1,), generator=generator))
            ids_SN[row, at : at + size] = torch.cat([head, rest[pair]])
        asked = int(torch.randint(0, pairs, (1,), generator=generator))
        ids_SN[row, -size:] = control_SN[row, -size:] = torch.cat([head, rest[asked]])
    target_SN[:, -KEY:] = True
    return Probe(name, ids_SN, control_SN, target_SN)
