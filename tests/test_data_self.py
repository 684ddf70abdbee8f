"""Data sampled from the model: seeded, full rows, global state untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from reattend.data import self_data
from reattend.errors import DataError


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=24,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_rows_are_full_seeded_and_leave_no_trace(model: Any) -> None:
    model.train()
    before = torch.get_rng_state()
    data = self_data(model, sequences=20, length=12, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    ids, mask = data.packed
    assert ids.shape == (20, 12)
    assert bool(mask.all())
    assert (ids[:, 0] == 1).all()
    assert not (ids[:, 1:] == 2).any()  # the end token would cut the row
    assert len(ids.unique(dim=0)) == 20
    assert self_data(model, sequences=20, length=12, seed=3).fingerprint == data.fingerprint
    assert self_data(model, sequences=20, length=12, seed=4).fingerprint != data.fingerprint
    assert "self" in data.description


def test_length_defaults_to_what_the_model_takes(model: Any) -> None:
    assert self_data(model, sequences=1).packed[0].shape == (1, 24)
    with pytest.raises(DataError, match="2 to 24"):
        self_data(model, sequences=1, length=25)


def test_models_that_cannot_generate_get_the_line_to_paste() -> None:
    small = {"vocab_size": 32, "num_heads": 2, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    bert = BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8,
    )  # fmt: skip
    for other in (nn.Linear(2, 2), BertModel(bert), T5ForConditionalGeneration(T5Config(**small))):
        with pytest.raises(DataError, match="data="):
            self_data(other)
