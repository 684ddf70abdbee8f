"""ALiBi read off the values of a mask: slopes, whatever origin the keys are counted from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reattend.passes.find.alibi import read_alibi
from reattend.passes.find.reasons import NotUnderstood

N, HEADS = 9, 2
SLOPES_H11 = torch.tensor([0.5, 0.25], dtype=torch.float64)[:, None, None]
KEY = torch.arange(N, dtype=torch.float64)
LATER = torch.ones(N, N, dtype=torch.bool).triu(1)

SPELLINGS = [
    SLOPES_H11 * KEY,  # [H, 1, M]
    SLOPES_H11 * (KEY[None, :] - KEY[:, None]),
    SLOPES_H11 * (KEY - (N - 1)),
]


@pytest.mark.parametrize("hidden", [-torch.inf, float(torch.finfo(torch.float32).min), None])
@pytest.mark.parametrize("added", SPELLINGS)
def test_slopes_from_any_origin(added: Tensor, hidden: float | None) -> None:
    mask = added.expand(HEADS, N, N)[None]
    if hidden is not None:
        mask = mask.masked_fill(LATER, hidden)
    assert read_alibi(mask, HEADS).slopes == pytest.approx((0.5, 0.25))


def test_the_first_keys_may_be_hidden() -> None:
    mask = (SLOPES_H11 * KEY).expand(HEADS, N, N)[None].masked_fill(KEY < 3, -torch.inf)
    assert read_alibi(mask, HEADS).slopes == pytest.approx((0.5, 0.25))


def test_one_slope_for_all_heads() -> None:
    assert read_alibi((0.5 * KEY).expand(1, 1, N, N), HEADS).slopes == pytest.approx((0.5, 0.5))


def bent() -> Tensor:
    mask = (SLOPES_H11 * KEY).expand(HEADS, N, N).clone()
    mask[1, 3, 4] += 1e-6
    return mask


REFUSED = {
    "squared": SLOPES_H11 * KEY.square(),
    "one number differs": bent(),
    "by the query's position": (SLOPES_H11 * (KEY[None, :] * KEY[:, None])),
    "other heads": (SLOPES_H11 * KEY).expand(HEADS, N, N).repeat(2, 1, 1),
    "two keys": (SLOPES_H11 * KEY[:2]).expand(HEADS, 2, 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_slope_is_refused(case: str) -> None:
    with pytest.raises(NotUnderstood, match="not linear in key position"):
        read_alibi(REFUSED[case], HEADS)


def test_rows_of_the_batch_must_agree() -> None:
    mask = (SLOPES_H11 * KEY).expand(2, HEADS, N, N) * torch.tensor([1.0, 2.0])[:, None, None, None]
    with pytest.raises(NotUnderstood, match="rows of the batch"):
        read_alibi(mask, HEADS)
