"""Logits in pieces: the same numbers, and never more of them than a limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_models

from reattend import at_once, find_attention, statistics
from reattend.at_once import rows_at_once, rows_within, spans, tokens_at_once, without_logits
from reattend.data import Dataset
from reattend.plan import Plan
from reattend.preflight import preflight
from reattend.rewriting import normal_forms, rewrite
from reattend.verify.quality import agreement, mean_loss, measure
from reattend.verify.scoring import full_scorer


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo_models.build("llama")


def data(model: Any, rows: int = 5) -> Dataset:
    order = torch.Generator().manual_seed(3)
    ids = torch.randint(3, model.config.vocab_size, (rows, 23), generator=order)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return Dataset([{"input_ids": ids, "attention_mask": mask}], description="random")


def test_pieces_cover_a_row_once() -> None:
    for tokens, vocabulary in ((23, 97), (1, 10**9), (5, at_once.COPY_BYTES // 8)):
        found = [i for piece in spans(tokens, vocabulary) for i in range(tokens)[piece]]
        assert found == list(range(tokens))
    assert tokens_at_once(at_once.COPY_BYTES // 8) == 2
    assert (rows_within(at_once.LOGITS_BYTES // 3, 8), rows_within(1 << 40, 8)) == (3, 1)


def test_losses_in_pieces_are_those_of_whole_rows(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, rows = zoo_models.build("llama"), data(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole = mean_loss(full_scorer(model), rows), agreement(model, other, rows)
    monkeypatch.setattr(at_once, "COPY_BYTES", 4 * model.config.vocab_size * 7)
    assert len(list(spans(23, model.config.vocab_size))) == 4
    assert mean_loss(full_scorer(model), rows)[0] == pytest.approx(whole[0][0], rel=1e-6)
    pieces = agreement(model, other, rows)
    assert pieces["kl"] == pytest.approx(whole[1]["kl"], rel=1e-6)
    assert (pieces["top1"], whole[1]["kl"] > 1e-4) == (whole[1]["top1"], True)


def test_models_are_compared_in_stretches_of_a_long_row(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, rows = zoo_models.build("llama"), data(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    whole, formed = agreement(model, other, rows, batch_size=1), []
    loss, counted = mean_loss(full_scorer(other), rows, batch_size=1)
    monkeypatch.setattr(at_once, "LOGITS_BYTES", 4 * model.config.vocab_size * 10)
    hook = other.lm_head.register_forward_hook(lambda m, given, out: formed.append(out.shape[1]))
    ran: list[int] = []
    below = other.model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    found = measure(other, rows, model, with_recall=False, batch_size=1)
    hook.remove()
    below.remove()
    assert formed == 5 * [10, 10, 3]
    assert len(ran) == 5, "the layers run once per row"
    assert "forward" not in {*vars(other.model), *vars(model.model)}
    assert (found.tokens, found.loss) == (counted, pytest.approx(loss, rel=1e-6))
    assert (found.kl, found.top1) == (pytest.approx(whole["kl"], rel=1e-5), whole["top1"])


def test_a_large_vocabulary_is_asked_row_by_row(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = 23 * model.config.vocab_size * next(model.parameters()).element_size()
    assert rows_at_once(model, 23, most=8) == 8
    monkeypatch.setattr(at_once, "LOGITS_BYTES", 2 * row + 1)
    assert rows_at_once(model, 23, most=8) == 2


def test_statistics_need_no_logits_no_cache_and_are_spent(model: Any) -> None:
    plan = Plan.load({"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]})
    choices = preflight(find_attention(model), plan)
    forms = normal_forms(model, choices)
    sites = {c.site.path: (forms[c.site.path], c.site.binding) for c in choices}
    needs = {c.site.path: c.needs for c in choices}
    seen: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    cached: list[bool] = []
    whole = model.register_forward_pre_hook(
        lambda _, args, given: cached.append(given["use_cache"]), with_kwargs=True
    )
    moments = statistics.collect(model, sites, data(model).batches(4), needs=needs)
    hook.remove()
    whole.remove()
    assert (seen, cached) == ([1, 1], [False, False])
    assert without_logits(zoo_models.build("bert")) == {}
    kept = dict(moments)
    spent = rewrite(model, choices, moments, spend=True)
    again = rewrite(model, choices, kept)
    assert (moments, len(kept)) == ({}, len(choices))
    assert all(
        torch.equal(a, b)
        for a, b in zip(spent.model.parameters(), again.model.parameters(), strict=True)
    )
