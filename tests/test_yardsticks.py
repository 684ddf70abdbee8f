"""Yardsticks: window semantics against a real sliding-window model, and cache bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from reattend.data import Dataset, load_data
from reattend.errors import ArgumentError
from reattend.verify.yardsticks import (
    cache_elements_per_token,
    original,
    quantised_cache,
    sliding_window,
    window_mask,
    yardsticks,
)

SMALL: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def data() -> Dataset:
    ids = torch.randint(0, 160, (3, 160), generator=torch.Generator().manual_seed(0))
    return load_data(ids, seq_len=160)


def logits(yardstick: Any, data: Dataset) -> Tensor:
    return yardstick.scorer(*data.packed)


def test_window_is_what_a_sliding_window_model_computes(model: Any, data: Dataset) -> None:
    other: Any = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=40)).eval()
    other.load_state_dict(model.state_dict())
    expected = other(data.packed[0]).logits
    got = logits(sliding_window(model, keep=0.25, context=160), data)
    assert (got - expected).abs().max() < 1e-4
    off = logits(sliding_window(model, keep=39 / 160, context=160), data)
    assert (off - expected).abs().max() > 1e-2


def test_full_window_is_the_original_also_with_padding(model: Any, data: Dataset) -> None:
    ids, mask = data.packed
    mask = mask.clone()
    mask[1, 100:] = 0
    wide = sliding_window(model, keep=1.0, context=160)
    gap = wide.scorer(ids, mask) - original(model, context=160).scorer(ids, mask)
    assert gap[mask.bool()].abs().max() < 1e-4


def test_window_mask_by_hand() -> None:
    mask = window_mask(torch.tensor([[1, 1, 1, 0]]), 2)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_bytes(model: Any) -> None:
    elements = 3 * 2 * 2 * 16
    assert cache_elements_per_token(model) == elements
    assert original(model, context=160).cache_bytes_per_token == 2 * elements
    window = sliding_window(model, keep=0.25, context=160)
    assert (window.cache_bytes_per_token, window.share) == (elements / 2, 0.25)
    packed = quantised_cache(model, bits=4, context=160, residual=16)
    exact = elements * ((0.5 + 4 / 64) * 145 + 2 * 15) / 160
    assert packed.cache_bytes_per_token == pytest.approx(exact)
    assert packed.share == pytest.approx(exact / (2 * elements))


def test_quantisation_costs_more_with_fewer_bits(model: Any, data: Dataset) -> None:
    exact = logits(original(model, context=160), data)
    gaps = [
        float((logits(quantised_cache(model, bits=b, context=160), data) - exact).norm())
        for b in (8, 4, 2)
    ]
    assert 0 < gaps[0] < gaps[1] / 4  # 16 times finer steps; 2 bits saturate on random weights
    assert gaps[1] < gaps[2]


def test_all_measure_the_same_data(model: Any, data: Dataset) -> None:
    rows = yardsticks(model, context=160, keeps=(0.5,), bits=(8,))
    assert [row.name for row in rows] == ["original", "sliding window 50 %", "int8 KV cache"]
    plain, window, eight = (row.measure(data, teacher=model) for row in rows)
    assert plain.kl == 0
    assert 0 < (eight.kl or 0) < (window.kl or 0)
    assert plain.data == window.data == eight.data
    assert set(rows[1].recall(data)) == {"copy", "passkey", "multi_key"}
    assert rows[0].perplexity(data) == pytest.approx(plain.perplexity)


def test_refusals(model: Any) -> None:
    with pytest.raises(ArgumentError, match="keep"):
        sliding_window(model, keep=0, context=160)
    narrow = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    with pytest.raises(ArgumentError, match="widen"):
        sliding_window(narrow, keep=0.5, context=160)
