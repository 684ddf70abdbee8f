"""`to: linear` through the pipeline: presets, training, report, save and load, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder
from report_samples import sample

from reattend import convert, load
from reattend.errors import RefusedError
from reattend.plan import Plan
from reattend.report.headline import headline

RULE = {"sites": "*", "to": "linear", "window": 4, "feature_dim": 6, "feature_init": "uniform"}


def test_a_converted_model_learns_and_is_reported_saved_and_loaded(tmp_path: Any) -> None:
    model = decoder("llama", layers=2, groups=2)
    calibrate = {
        "tokens": 4000,
        "stages": ["layerwise"],
        "seq_len": 40,
        "batch_size": 4,
        "lr": 1e-2,
    }
    data = torch.randint(3, 97, (24, 40))
    result = convert(
        model, plan={"rules": [RULE], "calibrate": calibrate}, data=data, out=tmp_path / "m"
    )
    stage = result.report.calibration.stages[-1]
    assert stage.name == "layerwise"
    assert stage.loss[-1][1] < 0.9 * stage.loss[0][1]
    first = result.report.sites[0]
    assert (first.exactness, first.options["window"]) == ("learned", "4 terraced")
    assert "2 of 2 converted blocks are learned" in result.report.notes[-1]
    new = 2 * (2 * 4 * 6 * 8 + 4)  # two layers of two maps of 4 heads, and 4 weights
    grown = result.report.model.parameters_after - result.report.model.parameters_before
    assert grown == new
    mixer = result.model.model.layers[0].self_attn.mixer
    state, rows = 4 * 12 * 9, 8 * 2 * (8 + 8)
    assert first.cost is not None
    assert first.cost.after.cache_bytes_per_token == -(-(state + rows) // 4096) * 4
    ids = torch.randint(3, 97, (2, 15))
    loaded = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert (
        float((mixer.mix_H.detach().sigmoid() - 0.1).abs().min()) > 0
    )  # the weight of the window moved


@pytest.mark.parametrize(
    "name",
    [
        "lolcats",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("hedgehog", "supra", "liger", "lightning")
        ),
    ],
)
def test_presets_convert_and_generate(name: str) -> None:
    model = convert(decoder("llama", layers=2, groups=2), plan=name).model
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **run)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **run))
    assert Plan.load(name).rules[0].to == "linear"


def test_blocks_that_are_capped_or_slide_are_listed_with_their_reasons() -> None:
    with pytest.raises(RefusedError, match=r"pattern is sliding[\s\S]*capped by tanh"):
        convert(decoder("gemma2", layers=2, groups=2), plan="lolcats")


@pytest.mark.slow
def test_heads_of_some_groups_only() -> None:
    """A plan's `heads`: both kinds decode from one cache."""
    rule = {**RULE, "heads": [1]}
    model = convert(decoder("llama", layers=2, groups=2), plan={"rules": [rule]}).model
    ids = torch.randint(3, 97, (2, 9))
    run = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))


def test_a_report_warns_where_perplexity_holds_and_recall_falls() -> None:
    def told(ppl: float, copy: float) -> str:
        rows = [
            {"name": "original", "role": "original", "ppl": 5.0, "recall": {"copy": 0.9}},
            {"name": "converted", "role": "converted", "ppl": ppl, "recall": {"copy": copy}},
        ]
        return headline(sample(quality={"rows": rows, "data": "text"})).sentence

    warning = "Perplexity holds, and recall does not (copy 0.90 → 0.41)"
    assert warning in told(5.2, 0.41)
    assert "recall does not" not in told(5.2, 0.8)
    assert "recall does not" not in told(9.0, 0.41)
