"""The text that quality is measured on where the plan names one: `verify.data`."""

from __future__ import annotations

from dataclasses import dataclass

from reattend.data import Dataset, load_data
from reattend.plan import Plan
from reattend.source import Source


@dataclass(frozen=True)
class HeldOut:
    """Rows of `calibrate.seq_len` tokens, and those that recall is measured on; None: the same."""

    rows: Dataset
    recall: Dataset | None = None

    @property
    def fingerprint(self) -> str:
        """Identifies both."""
        parts = [self.rows] if self.recall is None else [self.rows, self.recall]
        return "+".join(part.fingerprint for part in parts)


def read_held_out(source: Source, plan: Plan, seed: int) -> HeldOut:
    """Evenly spaced rows of the text; for recall rows of another length, as many tokens.

    Raises:
        DataError: the text is missing or empty, or the model has no tokenizer.
    """
    length, wanted = plan.calibrate.seq_len, plan.verify

    def rows(tokens: int, most: int) -> Dataset:
        return load_data(wanted.data, source.tokenizer, seq_len=tokens, seed=seed).take(most)

    found, wide = rows(length, wanted.rows), wanted.recall_tokens
    if wide is None or wide == length:
        return HeldOut(found)
    return HeldOut(found, rows(wide, max(2, wanted.rows * length // wide)))
