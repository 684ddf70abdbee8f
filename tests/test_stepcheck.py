"""Programs around a mixer that need the whole sequence are told apart, and refuse a cache."""

from __future__ import annotations

from typing import Any

import around_models as models
import pytest
import torch

from reattend import convert, find_attention
from reattend.errors import RefusedError, UnsupportedCacheError


def stepwise(layer: type[models.InlinedLayer]) -> list[bool]:
    sites = find_attention(models.llama(layer)).sites
    assert len(sites) == 2
    return [s.binding.around.stepwise for s in sites if s.binding and s.binding.around]


def test_programs_on_single_tokens_may_use_a_cache() -> None:
    assert stepwise(models.InlinedLayer) == [True, True]


@pytest.mark.daily
@pytest.mark.parametrize("layer", [models.ShiftingLayer, models.CountingLayer])
def test_others_work_but_refuse_a_cache(layer: type[models.InlinedLayer]) -> None:
    assert stepwise(layer) == [False, False]
    model = models.llama(layer)
    result = convert(model, plan="identity")
    assert {s.owner.lacks for s in result.report.sites if s.owner} == {("KV cache",)}
    assert [p.name for p in result.report.parity] == ["equals the original"]
    prompts = models.prompts()
    real = prompts["attention_mask"].bool()
    with torch.no_grad():  # the first call fills an empty cache, which is the whole sequence
        gap = result.model(**prompts).logits - model(**prompts, use_cache=False).logits
    assert gap[real].abs().max() <= 1e-5
    run: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    with pytest.raises(UnsupportedCacheError, match="cannot continue from a cache"):
        result.model.generate(**prompts, **run)
    expected = model.generate(**prompts, **run, use_cache=False)
    assert bool((result.model.generate(**prompts, **run, use_cache=False) == expected).all())
    from reattend.targets.onnx.layout import layout

    with pytest.raises(RefusedError, match="whole sequence"):
        layout(result.model)
