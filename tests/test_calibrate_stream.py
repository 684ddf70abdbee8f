"""The batch stream: resumable at any position, reshuffled every epoch, cut to the budget."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from reattend.calibrate.schedule import factor
from reattend.calibrate.stream import Batch, Stream, cut
from reattend.data import Dataset


def rows(count: int, length: int = 4) -> Dataset:
    ids = torch.arange(count * length).view(count, length)
    return Dataset(
        [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], description="numbers"
    )


def first_ids(batch: Batch) -> list[int]:
    return [int(v) for v in batch.inputs["input_ids"][:, 0]]


@pytest.mark.parametrize("position", [0, 1, 3, 4, 9])
def test_starting_late_equals_skipping(position: int) -> None:
    whole = [first_ids(b) for b in islice(Stream(rows(10), 3, 7).batches(), 14)]
    late = [first_ids(b) for b in islice(Stream(rows(10), 3, 7).batches(position), 14 - position)]
    assert late == whole[position:]


def test_every_epoch_has_all_rows_in_another_order() -> None:
    stream = Stream(rows(10), 3, 7)
    seen = [v for b in islice(stream.batches(), 8) for v in first_ids(b)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == [4 * i for i in range(10)]
    assert seen[:10] != seen[10:]


def test_the_seed_decides_the_order() -> None:
    one, two, again = (
        [first_ids(b) for b in islice(Stream(rows(10), 3, seed).batches(), 4)] for seed in (1, 2, 1)
    )
    assert one == again != two


def test_cut_keeps_whole_rows_up_to_the_budget() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    batch = Batch({"input_ids": torch.ones(3, 4).long(), "attention_mask": mask}, 9)
    assert cut(batch, 9) is batch
    assert cut(batch, 6).tokens == 6
    assert cut(batch, 5).tokens == 6
    assert len(cut(batch, 1).inputs["input_ids"]) == 1


def test_rows_without_tokens_count_one_each() -> None:
    pixels = Dataset([{"pixel_values": torch.zeros(5, 3, 2, 2)}], description="pixels")
    assert [b.tokens for b in islice(Stream(pixels, 2, 0).batches(), 3)] == [2, 2, 1]


def test_schedule_rises_then_falls_to_zero() -> None:
    values = [factor(i / 100) for i in range(101)]
    assert values[0] == 0.0
    assert values[5] == max(values) == 1.0
    assert values[5:] == sorted(values[5:], reverse=True)
    assert values[100] < 1e-12
