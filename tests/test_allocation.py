"""Sizes chosen on a whole model: within the budget, measured in place, nothing left changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models

from reattend import convert, divergence, find_attention, load
from reattend.allocation import trials, waiting
from reattend.data import Dataset, load_data
from reattend.divergence import Divergence, kept_places
from reattend.errors import InterruptedRun
from reattend.events import Event
from reattend.plan import Plan
from reattend.preflight import preflight
from reattend.rewriting import normal_forms

AUTO = {"sites": "*", "to": "mla", "kv_keep": 0.4, "kv_lora_rank": "auto",
        "qk_rope_head_dim": "auto"}  # fmt: skip


def data() -> torch.Tensor:
    return torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.daily
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_model_converts_within_the_budget(name: str, tmp_path: Any) -> None:
    model = zoo_models.build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = convert(model, plan={"rules": [AUTO]}, data=data(), out=tmp_path / "out")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sizes = [s.options for s in result.report.sites]
    assert all(isinstance(o["kv_lora_rank"], int) for o in sizes)
    assert result.report.totals.cache_ratio <= 0.4
    assert result.report.totals.cache_ratio > 0.3
    ids = data()[:2, :9]
    run = {"max_new_tokens": 8, "do_sample": False}
    again = load(tmp_path / "out").generate(ids, **run)
    assert bool((again == result.model.generate(ids, **run)).all())


def test_the_sites_of_a_rule_share_its_budget_and_no_others() -> None:
    """Widths listed by layer do not divide it; an equal rule for other layers has its own."""
    found = find_attention(zoo_models.build("llama"))

    def shared(*rules: dict[str, Any]) -> list[int]:
        return [len(g) for g in waiting(preflight(found, Plan.load({"rules": list(rules)})))]

    assert shared(AUTO) == [2]
    assert shared({**AUTO, "qk_rope_head_dim": [4, 2]}) == [2]
    assert shared({**AUTO, "layers": [0]}, AUTO) == [1, 1]


def test_lists_of_sizes_reach_their_layers() -> None:
    model = zoo_models.build("llama")
    layers = len(find_attention(model).sites)
    ranks = [6 + i for i in range(layers)]
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": ranks, "qk_rope_head_dim": 4}]}
    result = convert(model, plan=plan, data=data())
    assert [s.options["kv_lora_rank"] for s in result.report.sites] == ranks


def test_an_unchanged_block_does_not_diverge_and_a_broken_one_does() -> None:
    model = zoo_models.build("llama")
    plan = Plan.load({"rules": [AUTO]})
    choices = preflight(find_attention(model), plan)
    rows = load_data(data(), None, seq_len=40, seed=0)
    measure = Divergence(model, {c.site.path: c for c in choices}, rows)
    forms = normal_forms(model, choices)
    path = choices[1].site.path
    assert abs(measure(path, forms[path])) < 1e-5
    broken = normal_forms(model, choices)[path]
    broken.v_proj.weight = torch.nn.Parameter(torch.zeros_like(broken.v_proj.weight))
    worse = measure(path, broken)
    assert worse > 1e-4
    assert abs(measure(path, forms[path])) < 1e-5  # the broken one is gone again


def test_of_a_large_vocabulary_some_tokens_of_every_row_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo_models.build("llama")
    monkeypatch.setattr(divergence, "OUTPUT_BYTES", 4 * 4 * model.config.vocab_size * 5)
    places = kept_places(4, 40, model.config.vocab_size)
    assert places.tolist() == [7, 15, 23, 31, 39]
    assert kept_places(4, 5, model.config.vocab_size).tolist() == [0, 1, 2, 3, 4]
    choices = preflight(find_attention(model), Plan.load({"rules": [AUTO]}))
    ids, mask = data()[:4], torch.ones(4, 40, dtype=torch.long)
    mask[1, 20:] = 0  # three of five places of this row are padding
    rows = Dataset([{"input_ids": ids, "attention_mask": mask}], description="random")
    path = choices[1].site.path
    broken = normal_forms(model, choices)[path]
    broken.v_proj.weight = torch.nn.Parameter(torch.zeros_like(broken.v_proj.weight))
    found = Divergence(model, {c.site.path: c for c in choices}, rows)(path, broken)

    other = zoo_models.build("llama")
    torch.nn.init.zeros_(other.get_submodule(path).v_proj.weight)  # type: ignore[arg-type]
    with torch.no_grad():
        before, after = (
            m(input_ids=ids, attention_mask=mask).logits[:, places].log_softmax(-1)
            for m in (model, other)
        )
    gap = (before.exp() * (before - after)).sum(-1)[mask[:, places].bool()]
    assert len(gap) == 17
    assert found == pytest.approx(float(gap.mean()), rel=1e-4)


@pytest.mark.parametrize(
    "rule",
    [
        {"to": "sparse", "pattern": {"window": 5}, "keep_full": 0.5},
        {"to": "sparse", "pattern": {"window": 5}, "keep_full": 0.5, "finder": "alpha", "steps": 2},
        {"to": "mla", "kv_keep": 0.4, "kv_lora_rank": "auto", "qk_rope_head_dim": "auto"},
    ],
    ids=["search", "alpha", "auto"],
)
def test_trials_are_foretold_counted_and_not_repeated_after_a_kill(
    rule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = zoo_models.build("llama"), {"rules": [{"sites": "*", **rule}]}
    foretold = trials(waiting(preflight(find_attention(model), Plan.load(plan))))
    told: list[Event] = []

    def stop(event: Event) -> None:
        told.append(event)
        if event.stage == "rewrite":
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, InterruptedRun)):
        convert(model, plan=plan, data=data(), out=tmp_path / "out", on_event=stop)
    counted = [e for e in told if e.stage == "choose" and e.total]
    assert (counted[-1].done, counted[-1].total) == (foretold, foretold)
    assert [e.done for e in counted] == sorted(e.done for e in counted)

    def never(*_: object) -> None:
        raise AssertionError("chosen again")

    monkeypatch.setattr("reattend.allocation.Divergence", never)
    again = convert(model, plan=plan, data=data(), out=tmp_path / "out")
    assert again.run is not None
    assert {s.name for s in again.run.stages if s.reused} == {"statistics", "choose"}
    monkeypatch.undo()
    fresh = convert(model, plan=plan, data=data())
    assert fresh.report.to_json() == again.report.to_json()
