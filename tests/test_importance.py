"""Scores of heads: what they add, what leaving them out does, and derivatives by differences."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import HIDDEN, config, dense

from reattend import convert
from reattend.mixers.base import Context
from reattend.passes.rewrite.base import Answered, Subject
from reattend.passes.rewrite.importance import (
    first_order,
    input_norms,
    leave_one_out,
    output_norms,
    ranked,
)
from reattend.passes.rewrite.moh_options import MohOptions


def rows() -> list[torch.Tensor]:
    return [torch.randn(n, HIDDEN, dtype=torch.float64) for n in (9, 14)]


def test_the_output_norm_is_the_error_without_the_head() -> None:
    block, texts = dense(config(8, 4)), rows()
    scores = output_norms(block, texts)
    for head in (0, 5):
        squares, count = 0.0, 0
        for x in texts:
            with torch.no_grad():
                whole = block(x[None], Context())
                kept = block.o_proj.weight.clone()
                block.o_proj.weight.unflatten(1, (8, -1))[:, head] = 0
                squares += float((whole - block(x[None], Context())).square().sum())
                block.o_proj.weight.copy_(kept)
            count += len(x)
        assert float(scores[head]) == pytest.approx((squares / count) ** 0.5, rel=1e-10)


def test_the_input_norm_is_minitrons() -> None:
    block, texts = dense(config(8, 4)), rows()
    seen: list[torch.Tensor] = []
    block.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    for x in texts:
        block(x[None], Context())
    channel = torch.stack([u.abs().mean(0) for u in seen]).square().sum(0).sqrt()
    expected = channel.view(8, 8).square().sum(1).sqrt()
    assert torch.allclose(input_norms(block, texts), expected, rtol=1e-12)
    assert ranked(expected, 4)[0] == int(expected.view(4, 2).norm(dim=1).argmax())


class Asked:
    """A measure over one block: the loss is a plain function of the block's output."""

    length = 6

    def __init__(self) -> None:
        self.x = torch.randn(1, 6, HIDDEN, dtype=torch.float64)
        self.words = torch.randn(HIDDEN, 7, dtype=torch.float64)

    def loss(self, mixer: Any) -> torch.Tensor:
        return self._answer(mixer).loss

    def _answer(self, mixer: Any) -> Answered:
        logits = mixer(self.x, Context())[0] @ self.words
        return Answered(torch.arange(6), torch.arange(6), logits, torch.arange(6))

    @contextmanager
    def answers(self, mixers: Any, length: int, count: int) -> Any:
        assert length == self.length
        yield (self._answer(mixer) for mixer in mixers.values())

    def __call__(self, path: str, mixer: Any) -> float:
        with torch.no_grad():
            return float(self.loss(mixer))


def without(block: Any, groups: list[int], by: float) -> Any:
    """A copy of the block with some groups of the output projection's inputs times 1 - by."""
    other = dense(block.config)
    with torch.no_grad():
        weight = other.o_proj.weight.unflatten(1, (4, -1))
        weight[:, groups] *= 1 - by
    return other


def test_leave_one_out_asks_the_model() -> None:
    block, measure = dense(config(8, 4)), Asked()
    site = Subject("a", block, None, MohOptions())  # type: ignore[arg-type]
    got = leave_one_out([site], measure, {"a": 4})["a"]  # type: ignore[arg-type]
    expected = [measure("a", without(block, [g], 1.0)) for g in range(4)]
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_first_order_is_the_derivative_of_the_loss() -> None:
    """By central differences; the loss is a number of 32 bits."""
    block, measure, step = dense(config(4, 4)), Asked(), 3e-3
    site = Subject("a", block, None, MohOptions())  # type: ignore[arg-type]
    got = first_order([site], measure)["a"]  # type: ignore[arg-type]
    for head in range(4):
        far = [measure("a", without(block, [head], by)) for by in (step, -step)]
        assert float(got[head]) == pytest.approx(abs(far[0] - far[1]) / (2 * step), rel=3e-3)


@pytest.mark.parametrize(
    "importance", ["first-order", pytest.param("leave-one-out", marks=pytest.mark.slow)]
)
def test_a_group_that_does_nothing_comes_last(importance: str) -> None:
    model = decoder("llama", layers=2, groups=4)
    with torch.no_grad():
        for layer, group in enumerate((0, 2)):
            weight = model.model.layers[layer].self_attn.o_proj.weight
            weight.unflatten(1, (4, -1))[:, group] = 0
    rule = {"sites": "*", "to": "moh", "top_k": 2, "importance": importance}
    plan = {"rules": [rule], "calibrate": {"seq_len": 24, "statistics_tokens": 240}}
    result = convert(model, plan=plan, data=torch.randint(3, 97, (12, 24)))
    orders = [layer.self_attn.mixer.config.order for layer in result.model.model.layers]
    assert [order[-1] for order in orders] == [0, 2]
