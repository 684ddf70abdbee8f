"""An endless, reproducible stream of training batches that can start anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from torch import Tensor

from reattend.data import Dataset


@dataclass(frozen=True)
class Batch:
    """Model inputs (first axis: rows) and the number of real tokens among them."""

    inputs: dict[str, Tensor]
    tokens: int


class Stream:
    """Epoch after epoch of a dataset, each shuffled anew by (seed, epoch).

    Positions count batches, so a resumed stage asks for `batches(position)` and sees exactly
    what an uninterrupted one would have seen. Stages continue one stream: the second does not
    repeat the rows of the first while there are fresh ones.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        self.dataset = Dataset(dataset.blocks, description=dataset.description, seed=seed)
        self.batch_size = batch_size
        rows = [len(next(iter(block.values()))) for block in dataset.blocks]
        self.per_epoch = sum(-(-r // batch_size) for r in rows)
        self.mean_tokens = max(1.0, dataset.tokens / max(1, self.per_epoch))

    def batches(self, position: int = 0) -> Iterator[Batch]:
        """Batches from `position` on, without end."""
        skip = position % self.per_epoch
        for epoch in count(position // self.per_epoch):
            for inputs in islice(self.dataset.batches(self.batch_size, epoch=epoch), skip, None):
                yield Batch(inputs, int(row_tokens(inputs).sum()))
            skip = 0


def row_tokens(inputs: dict[str, Tensor]) -> Tensor:
    """Real tokens of each row; rows without token ids count as one each."""
    first = next(iter(inputs.values()))
    if "input_ids" not in inputs:
        return first.new_ones(len(first)).long()
    mask = inputs.get("attention_mask")
    ids = inputs["input_ids"]
    return mask.long().sum(-1) if mask is not None else ids.new_full((len(ids),), ids.shape[-1])


def cut(batch: Batch, tokens: int) -> Batch:
    """The first rows of a batch, as many as reach `tokens` tokens (at least one row)."""
    if batch.tokens <= tokens:
        return batch
    each = row_tokens(batch.inputs)
    rows = int((each.cumsum(0) < tokens).sum()) + 1
    return Batch({name: t[:rows] for name, t in batch.inputs.items()}, int(each[:rows].sum()))
