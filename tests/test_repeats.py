"""Rows in which heads have to look things up, at several distances."""

import torch

from reattend.passes.rewrite.repeats import PIECES, repeated, sources


def test_rows_repeat_the_pieces_of_their_first_half() -> None:
    batch = {"input_ids": torch.arange(34).view(2, 17), "attention_mask": torch.ones(2, 17)}
    made = repeated(batch)
    again = [6, 7, 4, 5, 2, 3, 0, 1]
    assert sources(17).tolist() == again
    assert made["input_ids"][0].tolist() == [*range(8), *again]
    assert made["input_ids"][1].tolist() == [17 + i for i in (*range(8), *again)]
    assert made["attention_mask"].shape == (2, 16)
    pixels = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    assert repeated(pixels) is pixels


def test_distances_are_spread_over_the_row() -> None:
    length = 1024
    distance = length // 2 + torch.arange(length // 2) - sources(length)
    assert sorted(set(distance.tolist())) == [length * (2 * n + 1) // 8 for n in range(PIECES)]


def test_the_shortest_rows_repeat_too() -> None:
    assert repeated({"input_ids": torch.tensor([[5, 6, 7, 8]])})["input_ids"].tolist() == [
        [5, 6, 6, 5]
    ]
