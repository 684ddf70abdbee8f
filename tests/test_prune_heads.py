"""Heads taken out for good: the original with their outputs at nothing, and a smaller cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import CASES, config, dense, moments
from moh_blocks import wide
from test_moh import gap, inputs

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.passes.rewrite.prune_heads import PruneOptions, ToPruneHeads, balanced


def pruned(block: Any, **options: Any) -> Any:
    made, given = ToPruneHeads(), PruneOptions(**options)
    refusal = made.check(block.config, given)
    assert refusal is None, refusal
    needs = made.wants(block.config, given)
    return made.build(block, moments(block) if needs else None, given)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].out_features])
def test_the_others_compute_what_they_did(name: str) -> None:
    """Both ways to prune, beside the original whose output projection ignores the heads."""
    for options, gone in (
        ({"prune": "heads", "keep": 4, "order": (7, 0, 3, 5, 6, 1, 2, 4)}, (1, 2, 4, 6)),
        ({"keep": 0.5, "order": (2, 0, 3, 1)}, (2, 3, 6, 7)),
    ):
        block = dense(wide(CASES[name]))
        built = pruned(block, **options)
        x, real = inputs(9)
        with torch.no_grad():
            got = built.mixer(x, Context(mask=real))
            block.o_proj.weight.unflatten(1, (8, -1))[:, list(gone)] = 0
            assert gap(got, block(x, Context(mask=real)), real) <= 1e-12
        assert (
            built.mixer.config
            == ToPruneHeads().outcome(dense(wide(CASES[name])).config, PruneOptions(**options))
            or name == "alibi"
        )
        shape = built.mixer.row_shapes[0][0]
        assert shape == (4 if options.get("prune") else 2)


def test_the_exact_setting_is_the_original() -> None:
    block = dense(wide(config()))
    assert pruned(block, **ToPruneHeads().exact_setting(block.config).model_dump()).mixer is block


def test_what_adds_least_goes() -> None:
    block = dense(wide(config()))
    with torch.no_grad():
        for group, size in enumerate((1.0, 0.1, 9.0, 3.0)):
            block.o_proj.weight.unflatten(1, (4, -1))[:, group] *= size
    assert pruned(block, keep=2).evidence["kv-groups"] == "2, 3"
    assert balanced((5, 0, 1, 7, 2, 3, 6, 4), 4, 4) == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("cfg", "options", "reason"),
    [
        (config(8, 4), {"keep": 5}, "keep 5 of 4 KV groups"),
        (config(8, 4), {"keep": 6, "prune": "heads"}, "shared evenly by 4 KV groups"),
        (config(), {}, "nothing would be pruned"),
        (config(8, 4, out=False), {}, "no output projection"),
        (config(8, 4, out=False), {"importance": "input-norm"}, "no output projection"),
    ],
)
def test_what_does_not_fit_is_refused(cfg: Any, options: Any, reason: str) -> None:
    refusal = ToPruneHeads().check(cfg, PruneOptions(**options))
    assert refusal is not None and reason in refusal.reason


def test_a_model_caches_less_and_generates(tmp_path: Any) -> None:
    """Reported, saved and loaded; decoding with a cache is checked by the conversion itself."""
    model = decoder("llama", layers=2, groups=4)
    rule = {"sites": "*", "to": "prune-heads", "keep": [0.5, 3]}
    data = torch.randint(3, 97, (8, 20))
    result = convert(model, plan={"rules": [rule]}, data=data, out=tmp_path / "m")
    assert [s.options["kept"] for s in result.report.sites] == ["2 of 4", "3 of 4"]
    assert result.report.totals.cache_ratio == pytest.approx(5 / 8)
    grown = result.report.model.parameters_after - result.report.model.parameters_before
    assert grown == -3 * 4 * 8 * model.config.hidden_size
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    got = load(tmp_path / "m").generate(ids, **run)
    assert bool((got == result.model.generate(ids, use_cache=False, **run)).all())
