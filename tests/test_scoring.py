"""Scorers: whole rows, cached chunks and padding give the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from reattend.errors import ArgumentError, GateError
from reattend.verify.scoring import cached_scorer, evaluating, full_scorer, logits_of, token_nll


class Bare(nn.Module):
    """A module that knows tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("chunk", [1, 5, 40])
def test_cached_equals_full(model: Any, chunk: int) -> None:
    ids = torch.randint(0, 64, (3, 21))
    mask = torch.ones_like(ids)
    gap = cached_scorer(model, chunk=chunk)(ids, mask) - full_scorer(model)(ids, mask)
    assert gap.abs().max() < 1e-4


@pytest.mark.parametrize("make", [full_scorer, cached_scorer])
@pytest.mark.parametrize("positions", ["rotary", "learned"])  # rotary alone forgives a shift
def test_left_padding_changes_nothing(model: Any, make: Any, positions: str) -> None:
    if positions == "learned":
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
        model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 64, (2, 15))
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :6] = 0
    plain = full_scorer(model)(ids, torch.ones_like(ids))
    assert (make(model)(padded, mask)[:, 6:] - plain).abs().max() < 1e-4


def test_token_nll_counts_real_pairs_only() -> None:
    ids = torch.tensor([[3, 1, 2, 0], [0, 0, 5, 6]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    logits = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    logits[0, 3] = float("nan")  # behind padding: never read
    nll, right, real = token_nll(logits, ids, mask)
    assert real.tolist() == [[True, True, False], [False, False, True]]
    expected = -logits[1, 2].double().log_softmax(-1)[6]
    assert nll[1, 2].double() == pytest.approx(float(expected), rel=1e-5)
    assert bool(right[0, 0]) == (int(logits[0, 0].float().argmax()) == 1)
    logits[0, 1, 4] = float("nan")
    with pytest.raises(GateError, match="NaN"):
        token_nll(logits, ids, mask)


def test_modes_are_restored_module_by_module(model: Any) -> None:
    model.train()
    model.lm_head.eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model.lm_head.training
    model.eval()


def test_models_without_mask_or_cache() -> None:
    bare, ids = Bare(), torch.ones(1, 4, dtype=torch.long)
    assert full_scorer(bare)(ids, torch.ones_like(ids)).shape == (1, 4, 8)
    with pytest.raises(ArgumentError, match="padding"):
        full_scorer(bare)(ids, torch.tensor([[1, 1, 1, 0]]))
    with pytest.raises(ArgumentError, match="no KV cache"):
        cached_scorer(bare)
    with pytest.raises(ArgumentError, match="no logits"):
        logits_of(torch.ones(2, 3))
