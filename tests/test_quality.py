"""Perplexity, agreement and `measure` against values known by hand and the shipped model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from reattend.data import Dataset, load_data
from reattend.errors import DataError
from reattend.verify.quality import agreement, measure, perplexity
from reattend.verify.scoring import full_scorer

MODEL = Path(__file__).parents[1] / "examples/models/pycode-gqa"


class Bigram(nn.Module):
    """Logits depend on the current token: everything can be computed by hand."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table[ids]


def padded() -> Dataset:
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    return load_data({"input_ids": ids, "attention_mask": mask}, seq_len=4)


def test_uniform_model_has_perplexity_of_its_vocabulary() -> None:
    assert perplexity(Bigram(torch.zeros(9, 9)), padded()) == pytest.approx(9, rel=1e-6)


def test_mean_is_over_tokens_not_rows_or_batches() -> None:
    table = torch.randn(9, 9)
    log = table.double().log_softmax(-1)
    pairs = [(1, 2), (2, 3), (4, 5), (5, 6), (6, 7)]
    expected = math.exp(-sum(float(log[a, b]) for a, b in pairs) / 5)
    for batch_size in (1, 2):
        got = perplexity(Bigram(table), padded(), batch_size=batch_size)
        assert got == pytest.approx(expected, rel=1e-5)


def test_agreement_by_hand() -> None:
    teacher, student = torch.randn(9, 9), torch.randn(9, 9)
    tokens = [1, 2, 3, 4, 5, 6, 7]
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    kl = sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in tokens) / 7
    top1 = sum(int(p[t].argmax() == q[t].argmax()) for t in tokens) / 7
    got = agreement(Bigram(teacher), Bigram(student), padded())
    assert got == pytest.approx({"kl": kl, "top1": top1}, rel=1e-5)
    same = agreement(Bigram(teacher), Bigram(teacher), padded())
    assert same == {"kl": 0.0, "top1": 1.0}


def test_loss_and_agreement_take_one_pass_of_each_model() -> None:
    """In two batches, with and without a scorer of its own."""
    teacher, student = (Bigram(torch.randn(9, 9)) for _ in range(2))
    ran: list[nn.Module] = []
    for model in (teacher, student):
        model.register_forward_hook(lambda m, args, y: ran.append(m))
    for scorer in (None, full_scorer(student)):
        ran.clear()
        got = measure(student, padded(), teacher, with_recall=False, scorer=scorer, batch_size=1)
        assert sorted(map(id, ran)) == sorted([id(teacher), id(student)] * 2)
        assert got.perplexity == pytest.approx(perplexity(student, padded()), rel=1e-6)
        assert got.tokens == 5
        assert {"kl": got.kl, "top1": got.top1} == agreement(teacher, student, padded())


def test_nothing_to_predict() -> None:
    ids = torch.tensor([[1, 2]])
    data = Dataset([{"input_ids": ids, "attention_mask": torch.tensor([[1, 0]])}], description="d")
    with pytest.raises(DataError, match="No token can be predicted"):
        perplexity(Bigram(torch.zeros(9, 9)), data)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


def test_shipped_model_reads_held_out_text_as_when_it_was_trained(shipped: Any) -> None:
    model, tokenizer = shipped
    data = load_data(MODEL / "heldout.txt", tokenizer, seq_len=256)
    quality = measure(model, data.take(24), with_recall=False)
    trained = json.loads((MODEL / "measured.json").read_text())["held_loss_256"]
    assert quality.loss == pytest.approx(trained, abs=0.25)  # 24 of 390 rows, own sampling
    assert quality.perplexity == pytest.approx(math.exp(quality.loss))
    assert quality.tokens == 24 * 255
    assert (quality.kl, quality.top1, quality.recall) == (None, None, {})


def test_shipped_model_copies_and_decode_agrees(shipped: Any) -> None:
    model, tokenizer = shipped
    data = load_data(MODEL / "heldout.txt", tokenizer, seq_len=384, tokens=8 * 384)
    quality = measure(model, data, teacher=model)
    trained = json.loads((MODEL / "measured.json").read_text())["copy_acc"]
    assert quality.recall["copy"].accuracy == pytest.approx(trained, abs=0.12)
    assert all(value.gain > 1 for value in quality.recall.values())
    assert (quality.kl, quality.top1) == (0.0, 1.0)
    assert json.loads(json.dumps(quality.to_dict()))["recall"]["copy"]["tokens"] == 8 * 127
    few = data.take(2)
    full, cached = perplexity(model, few), perplexity(model, few, decode=True, chunk=64)
    assert cached == pytest.approx(full, rel=1e-4)
