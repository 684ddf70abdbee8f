"""Tokens by a score of their values (DMA): transformers' own mask, what is taught, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import CASES, HIDDEN, config, dense
from pydantic import ValidationError
from test_selecting import BOTH_WAYS, gap, inputs, scores
from test_selecting_gate import statistics
from transformers.models.doge.modeling_doge import DogeAttention

from reattend import convert
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.scores import own_pattern
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.passes.rewrite.sparse_values import lesson as lesson_of


def options(steps: int = 30, **select: Any) -> SparseOptions:
    return SparseOptions.model_validate(
        {"pattern": {"select": {"kind": "values", **select}}, "finder": "gate", "steps": steps}
    )


def untrained(block: DenseAttention, **select: Any) -> Any:
    """With weights at random."""
    mixer = ToSparse().build(block, None, options(**select)).mixer
    for p in mixer.selecting.parameters():
        p.data = torch.randn_like(p)
    return mixer


@pytest.mark.parametrize("budget", [{"topk": 99}, {"ratio": 1.0}])
@pytest.mark.parametrize("name", ["gqa", "softcap", "window", "sinks", "v-width"])
def test_a_budget_that_covers_everything_is_the_original(name: str, budget: Any) -> None:
    block = dense(CASES[name])
    mixer = untrained(block, **budget)
    x, real = inputs(30)
    with torch.no_grad():
        assert gap(mixer(x, Context(mask=real)), block(x, Context(mask=real)), real) < 1e-12


@pytest.mark.parametrize("window", [0, 9])
def test_what_is_chosen_is_the_mask_of_transformers(window: int) -> None:
    """Doge's, of the tokens before a query, and the query itself."""
    block, n = dense(config(window=window)), 40
    mixer = untrained(block, topk=6)
    method = mixer.selecting["0"]
    x, real = inputs(n, (0, 7))
    mask = torch.eye(n, dtype=torch.bool).expand(2, 4, n, n).clone()
    with torch.no_grad():
        for row, pad in enumerate((0, 7)):
            v = block.v_proj(x[row, pad:])
            states = torch.exp(method.gain_G * torch.nn.functional.softplus(v @ method.rate_Gf.T))
            i = torch.arange(n - pad)
            before = own_pattern(block.config.core, i[:, None], i) & (i[:, None] != i)
            made = DogeAttention.prepare_dynamic_mask(
                None, x[row : row + 1, pad:], states.T[None], 5, before[None, None]
            )[0]
            chosen = made > torch.finfo(torch.float64).min
            mask[row, :, pad:, pad:] |= chosen.repeat_interleave(2, 0)
        got = mixer(x, Context(mask=real))
        at = (real.cumsum(-1) - 1).clamp_min(0)
        assert gap(got, block(x, Context(mask=mask)), real) < 1e-12
        assert gap(mixer(x, Context(mask=real, position_BN=at)), got, real) < 1e-12


@pytest.mark.parametrize("name", ["gqa", "window", "sinks"])
def test_what_is_taught_is_the_attention_that_a_token_gets(name: str) -> None:
    """The divergence of every query, one by one."""
    block = dense(CASES[name])
    mixer = untrained(block, topk=4)
    x = torch.randn(11, HIDDEN, dtype=torch.float64)
    method = mixer.selecting["0"]
    lesson = lesson_of(mixer, x, (0, 1), method)
    assert lesson is not None and lesson_of(mixer, x[:2], (0, 1), method) is None
    with torch.no_grad():
        s, core, i = scores(block, x)[2], block.config.core, torch.arange(11)
        s = s.masked_fill(~own_pattern(core, i[:, None], i), float("-inf")).exp()
        more = block.sinks.exp().view(4, 1, 1) if block.sinks is not None else 0.0
        p = (s / (s.sum(-1, keepdim=True) + more)).unflatten(0, (2, 2)).sum(1)
        v = block.v_proj(x)
        score = method.gain_G * torch.nn.functional.softplus(v @ method.rate_Gf.T)
        found = []
        for g in range(2):
            for row in range(11):
                seen = [j for j in range(row) if not core.window or j > row - core.window]
                if len(seen) > 1:
                    target = p[g, row, seen] / p[g, row, seen].sum()
                    log = score[seen, g].log_softmax(-1)
                    found.append((target * (target.log() - log)).sum())
        assert (lesson.loss(method) - torch.stack(found).mean()).abs() < 1e-12


def test_training_brings_the_scores_nearer() -> None:
    """On texts whose queries have something in common, and so look for the same keys."""
    block = dense(config(pairs=0))
    asked = options(topk=9, steps=250)
    built = ToSparse().build(block, statistics(block, common=1.0), asked)
    before, _, after = built.evidence["values_kl"].split()[:3]
    assert float(after) < 0.95 * float(before)
    counted = sum(p.numel() for p in built.mixer.parameters())
    assert counted == ToSparse().cost(block.config, asked).parameters


def test_before_training_the_last_tokens_are_read() -> None:
    """And equal scores change nothing between a long call and a short one."""
    block = dense(config())
    mixer = ToSparse().build(block, None, options(topk=5)).mixer
    windowed = ToSparse().build(
        block, None, SparseOptions.model_validate({"pattern": {"window": 5}})
    )
    x, real = inputs(30)
    with torch.no_grad():
        expected = windowed.mixer(x, Context(mask=real))
        assert gap(mixer(x, Context(mask=real)), expected, real) < 1e-12


def test_occurrences_of_a_token_rank_by_place_however_a_product_rounds(monkeypatch: Any) -> None:
    block = dense(config())
    mixer = untrained(block, topk=6)
    x, real = inputs(5, (0, 0))
    x, real = x.repeat(1, 8, 1), real.repeat(1, 8)
    method, exact = mixer.selecting["0"], type(mixer.selecting["0"]).scores
    with torch.no_grad():
        expected = mixer(x, Context(mask=real))
        monkeypatch.setattr(
            type(method), "scores",
            lambda self, v: exact(self, v) * (1 + 1e-7 * torch.randn(v.shape[:3], dtype=v.dtype)),
        )  # fmt: skip
        assert gap(mixer(x, Context(mask=real)), expected, real) < 1e-12


def test_decoding_equals_one_pass() -> None:
    rule = {"sites": "*", "to": "sparse", "pattern": {"select": {"kind": "values", "topk": 5}},
            "finder": "gate", "steps": 40}  # fmt: skip
    plan = {"rules": [rule], "calibrate": {"seq_len": 24}}
    result = convert(
        decoder("llama", layers=2, groups=2), plan=plan, data=torch.randint(3, 97, (8, 24))
    )
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    expected = result.model.generate(ids, use_cache=False, **run)
    assert bool((result.model.generate(ids, **run) == expected).all())
    chunked = result.model.generate(ids, prefill_chunk_size=5, **run)
    assert bool((chunked == expected).all())
    said = result.report.sites[0].options
    assert said["select"] == "values (both)" and said["kv_density"] == "1.062"  # 17 of 16
    assert said["attention_density"].startswith("0.001 in prefill, 0.001")  # 5 of 4096
    assert [p.verdict for p in result.report.parity] == ["pass", "pass"]


def test_what_cannot_be_is_refused() -> None:
    refusal = ToSparse().check(BOTH_WAYS, options(topk=4))
    assert refusal is not None and "needs a causal block" in refusal.reason
    with pytest.raises(ValidationError, match="topk or ratio"):
        options(threshold=0.5)
