"""The printed bound is one: never below the measured error, zero where nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_models

from reattend import convert, find_attention
from reattend.mixers import dense, latent
from reattend.passes.rewrite.mla import ToMla
from reattend.plan import Plan
from reattend.preflight import choose
from reattend.rewriting import normal_forms, rewrite
from reattend.statistics import collect
from reattend.verify.bounds import block_bounds, recorded, variation
from reattend.verify.parity import block_errors
from reattend.weights import dense_config

FAST = ("llama",)
NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox"]
CASES = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in NAMES]


def padded() -> dict[str, Any]:
    ids = torch.randint(3, 97, (3, 29), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(name: str, options: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Measured error and bound by path, on tokens the conversion has not seen."""
    model = zoo_models.build(name, "eager" if name == "gemma2" else "sdpa")
    seen = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(4))
    rules = {"rules": [{"sites": "*", "to": "mla", **options}]}
    choices = choose(find_attention(model), Plan.load(rules))
    forms = normal_forms(model, choices)
    sites = {c.site.path: (forms[c.site.path], c.site.binding) for c in choices}
    needs = {c.site.path: c.needs for c in choices}
    moments = collect(model, sites, [{"input_ids": seen}], needs=needs)
    done = rewrite(model, choices, moments)
    errors = block_errors(model, done.model, list(done.built), padded())
    levels = frozenset({"exact", "bounded"})
    return errors, block_bounds(model, done, choices, padded(), levels)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_measured_errors_stay_below_the_bound(name: str, keep: float) -> None:
    errors, bounds = both(name, {"kv_keep": keep})
    assert errors.keys() == bounds.keys()
    for path, error in errors.items():
        assert error <= bounds[path] * (1 + 1e-4) + 1e-6, path  # float32
    assert keep > 0.5 or min(errors.values()) > 1e-3


def test_the_bound_vanishes_where_the_conversion_is_exact() -> None:
    site = find_attention(zoo_models.build("llama")).sites[0]
    exact = ToMla().exact_setting(dense_config(site.spec, site.hidden_size, 0))
    _, bounds = both("llama", exact.model_dump(exclude_none=True))
    assert max(bounds.values()) < 1e-5  # the model's own float32 rotary tables


def test_the_report_prints_it_for_bounded_blocks_only() -> None:
    seen = torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(4))
    rules = [
        {"layers": [0], "to": "mla", "kv_keep": 0.5},
        {"sites": "*", "to": "dense"},
    ]
    report = convert(zoo_models.build("llama"), plan={"rules": rules}, data=seen).report
    first, second = (s.error for s in report.sites)
    assert first is not None
    assert second is not None
    assert first.output_relative is not None
    assert first.output_bound is not None
    assert first.output_relative <= first.output_bound
    assert second.output_bound is None


def test_variation_bounds_the_distance_of_two_softmaxes() -> None:
    order = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0, 10.0):
        s = 3 * torch.randn(50, 20, generator=order, dtype=torch.float64)
        change = size * torch.randn(50, 20, generator=order, dtype=torch.float64)
        seen = torch.rand(50, 20, generator=order) < 0.7
        seen[:, 0] = True
        hidden = s.masked_fill(~seen, float("-inf"))
        p, new = hidden.softmax(-1), (hidden + change).softmax(-1)
        true = (p - new).abs().sum(-1) / 2
        bound = variation(p, change.masked_fill(~seen, 0), seen)
        assert bool((true <= bound * (1 + 1e-12) + 1e-12).all())
        assert bool((bound < 1).all())
        if size < 1:
            assert float(bound.mean()) <= 2 * float(true.mean())  # and it is not wasteful
    half = torch.tensor([[-0.5, 0.5]], dtype=torch.float64)  # the case where tanh is attained
    lift = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    p, new = half.softmax(-1), (half + lift).softmax(-1)
    bound = float(variation(p, lift, torch.ones(1, 2, dtype=torch.bool)))
    assert float((p - new).abs().sum()) / 2 == pytest.approx(bound, rel=1e-12)
    assert bound == pytest.approx(torch.tanh(torch.tensor(0.5, dtype=torch.float64)).item())


def test_attend_is_put_back_whatever_happens() -> None:
    before = dense.attend, latent.attend

    def fails() -> None:
        with recorded([]):
            assert dense.attend is not before[0]
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fails()
    assert (dense.attend, latent.attend) == before
