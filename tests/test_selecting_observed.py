"""Blocks that one pass saw and the next ones read (SparseD), on blocks that are not causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import config, dense
from test_selecting import BOTH_WAYS, LONG, converted, gap, inputs, scores
from torch import Tensor
from zoo_models import build

from reattend import convert
from reattend.denoising import denoising
from reattend.errors import ArgumentError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.patterns.pattern import HeadPattern
from reattend.plan import Plan

SMALL: dict[str, Any] = {"kind": "observed", "block": 8, "ratio": 0.3}


@pytest.mark.parametrize("block", [7, 64])
def test_a_budget_that_covers_everything_is_the_original(block: int) -> None:
    original = dense(BOTH_WAYS)
    mixer = converted(original, select=SMALL | {"block": block, "ratio": 1.0})
    for n in (30, LONG):
        x, real = inputs(n)
        with torch.no_grad():
            assert gap(mixer(x, Context(mask=real)), original(x, Context(mask=real)), real) < 1e-12


def best_blocks(original: DenseAttention, x: Tensor, size: int, prompt: int) -> Tensor:
    """Block by block: mean probability, the best 30 % of the prompt's blocks and of the others."""
    n = len(x)
    p = scores(original, x)[2].softmax(-1)
    starts = list(range(0, n, size))
    seen = torch.eye(n, dtype=torch.bool).expand(4, n, n).clone()
    for h in range(4):
        for a in starts:
            paid = {b: float(p[h, a : a + size, b : b + size].sum()) for b in starts}
            for part in ([b for b in starts if b < prompt], [b for b in starts if b >= prompt]):
                for b in sorted(part, key=lambda b: -paid[b])[: -(-len(part) * 3 // 10)]:
                    seen[h, a : a + size, b : b + size] = True
    return seen


@pytest.mark.parametrize(("size", "n"), [(8, 45), (64, LONG + 90)])
def test_a_pass_reads_the_map_that_an_earlier_one_found(size: int, n: int) -> None:
    """Padding on the right; ten passes: 0 to 3 see everything, 3 finds the map."""
    original = dense(BOTH_WAYS)
    mixer = converted(original, select=SMALL | {"block": size})
    real = torch.arange(n)[None] < torch.tensor([[n], [n - 7]])
    texts = [torch.randn(2, n, 24, dtype=torch.float64) for _ in range(6)]

    def masked(x: Tensor, seen_in: Tensor, new: int) -> Tensor:
        mask = torch.eye(n, dtype=torch.bool).expand(2, 4, n, n).clone()
        for row, m in enumerate((n, n - 7)):
            prompt = -(-(m - new) // size) * size if new else n
            found = best_blocks(original, seen_in[row, :m], size, prompt)
            mask[row, :, :m, :m] = found
        return original(x, Context(mask=mask))

    with torch.no_grad():
        alone = mixer(texts[0], Context(mask=real))
        assert gap(alone, masked(texts[0], texts[0], 0), real) < 1e-12
        with denoising(mixer, steps=10, new_tokens=size + 3):
            for number, x in enumerate(texts):
                got = mixer(x, Context(mask=real))
                expected = original(x, Context(mask=real))
                if number > 3:
                    expected = masked(x, texts[3], size + 3)
                assert gap(got, expected, real) < 1e-12, number
            with pytest.raises(ArgumentError, match="changed its length"):
                mixer(texts[0][:, : n - size], Context(mask=real[:, : n - size]))
        again = mixer(texts[0], Context(mask=real))
        assert torch.equal(again, alone)


def test_a_masked_language_model_fills_in_a_text() -> None:
    torch.manual_seed(0)
    original = build("bert")
    rule = {"sites": "*", "to": "sparse", "pattern": {"select": SMALL | {"block": 4}}}
    result = convert(original, plan={"rules": [rule]})
    model, ids = result.model, torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        expected = original(ids).logits
        alone = model(ids).logits
        with denoising(model, steps=5, new_tokens=8):
            dense_ones = [model(ids).logits for _ in range(3)]
            sparse = model(ids).logits
            with pytest.raises(ArgumentError, match="another one"), denoising(model, steps=5):
                pass
    for got in dense_ones:
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (sparse - expected).abs().max() > 1e-3 * expected.abs().max()
    assert (sparse - alone).abs().max() > 1e-6  # the prompt's blocks are chosen apart
    assert torch.equal(model(ids).logits, alone)
    said = result.report.sites[0].options
    assert said["select"] == "observed (both)"
    assert said["attention_density"] == "0.301, at most"  # 308 of 1024 blocks
    with pytest.raises(ArgumentError, match="without such blocks"), denoising(original, steps=5):
        pass


def test_the_preset_reads_less() -> None:
    made, options = ToSparse(), Plan.load("sparsed").rules[0].options
    assert made.check(BOTH_WAYS, options) is None
    after, before = made.cost(BOTH_WAYS, options), dense_cost(BOTH_WAYS)
    saved = 2 * 4 * 16 * (4096 - 10 * 128 - 1)  # 10 of 32 blocks, and itself
    assert after.flops_per_token == before.flops_per_token - saved


def test_a_causal_block_is_refused() -> None:
    pattern = HeadPattern.model_validate({"select": SMALL})
    refusal = ToSparse().check(config(), SparseOptions(pattern=pattern))
    assert refusal is not None and "not causal" in refusal.reason
