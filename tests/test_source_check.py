"""Weights that are no plain tensors in memory are refused by name, before anything reads them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reattend import convert
from reattend.errors import ModelError
from reattend.source_check import check_weights


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_plain_weights_pass() -> None:
    check_weights(tower())


def test_offloaded() -> None:
    with pytest.raises(ModelError, match=r"not in memory[\s\S]*0.weight"):
        convert(tower().to("meta"), plan="identity", inputs={"input": torch.randn(2, 3, 8)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_by_torch() -> None:
    packed = torch.ao.quantization.quantize_dynamic(tower(), {nn.Linear})
    with pytest.raises(ModelError, match=r"quantised[\s\S]*0\."):
        convert(packed, plan="identity", inputs={"input": torch.randn(2, 3, 8)})


def test_marked_by_transformers() -> None:
    model = tower()
    model.is_quantized = True
    with pytest.raises(ModelError, match="quantised"):
        check_weights(model)


def test_sharded() -> None:
    class DTensor(nn.Parameter):
        pass

    DTensor.__module__ = "torch.distributed.tensor"
    model = tower()
    model[1].weight = DTensor(torch.zeros(8, 8))  # type: ignore[index,union-attr,assignment]
    with pytest.raises(ModelError, match=r"sharded over processes[\s\S]*1.weight"):
        check_weights(model)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_not_numbers(value: float, word: str) -> None:
    model = tower()
    with torch.no_grad():
        next(model.parameters())[0, 0] = value
    with pytest.raises(ModelError, match=f"holds {word}"):
        check_weights(model)
