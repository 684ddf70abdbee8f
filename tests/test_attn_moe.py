"""Attention experts: the block itself at the start, then a mean weighed by the router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import CASES, config, dense
from moh_blocks import wide
from test_moh import FULL_NORM, gap, inputs

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.parts import kept_heads
from reattend.passes.rewrite.attn_moe import AttnMoeOptions, ToAttnMoe, spread
from reattend.passes.rewrite.base import dense_cost


def experts(block: Any, **options: Any) -> Any:
    made, given = ToAttnMoe(), AttnMoeOptions(**options)
    refusal = made.check(block.config, given)
    assert refusal is None, refusal
    return made.build(block, None, given).mixer


@pytest.mark.parametrize("kv", ["shared", "separate"])
@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].out_features])
def test_experts_start_as_the_block(name: str, kv: str) -> None:
    """Whatever the router says: its weights sum to 1, and are not equal."""
    block = dense(wide(CASES[name]))
    mixer = experts(block, experts=3, kv=kv)
    x, real = inputs(9)
    with torch.no_grad():
        got, expected = (m(x, Context(mask=real)) for m in (mixer, block))
        (_, routes), _ = mixer.project(x, x, Context(), None)
    assert gap(got, expected, real) <= 1e-12
    assert float(routes.gate_BUN.std(1).min()) > 1e-3
    made, options = ToAttnMoe(), AttnMoeOptions(experts=3, kv=kv)
    assert made.outcome(block.config, options) == mixer.config
    cost, before = made.cost(block.config, options), dense_cost(block.config)
    assert cost.cache == mixer.cache_per_token == before.cache * (3 if kv == "separate" else 1)
    grown = sum(p.numel() for p in mixer.parameters()) - sum(p.numel() for p in block.parameters())
    sinks = 16 if "sinks" in name else 0  # in no forecast
    assert grown == cost.parameters - before.parameters + sinks


@pytest.mark.parametrize("kv", ["shared", "separate"])
def test_experts_that_differ_are_weighed_by_a_softmax(kv: str) -> None:
    """Each expert run by itself, as the dense block of its heads."""
    block = dense(wide(config(bias=True)))
    mixer = experts(block, experts=2, kv=kv)
    for parameter in mixer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, real = inputs(9)
    plain = dense(mixer.config.model_copy(update={"kind": "dense"}))
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if "router" not in k})
    whose = [e for _ in range(4) for e in range(2) for _ in range(2)]
    weights = (x @ mixer.router.routed.weight.T).softmax(-1)
    expected = torch.zeros_like(x)
    for e in range(2):
        groups = [g for g in range(8) if g % 2 == e] if kv == "separate" else [0, 1, 2, 3]
        alone = kept_heads(plain, groups, [h for h in range(16) if whose[h] == e])
        with torch.no_grad():
            expected += weights[..., e : e + 1] * alone(x, Context(mask=real))
    with torch.no_grad():
        assert gap(mixer(x, Context(mask=real)), expected, real) <= 1e-12
    assert spread(block.config, AttnMoeOptions(kv="shared"))[0] == [0, 1, 2, 3]


def test_a_random_router_lets_experts_learn_apart() -> None:
    for init, apart in ((0.5, True), (0.0, False)):
        mixer = experts(dense(wide(config())), router_init=init)
        x, _ = inputs(9)
        mixer(x, Context()).square().sum().backward()
        first, second = mixer.q_proj.weight.grad.unflatten(0, (4, 2, 2 * 8)).unbind(1)
        assert (not torch.allclose(first, second)) == apart


def test_what_cannot_be_copied_is_refused_and_one_expert_is_the_block() -> None:
    made, block = ToAttnMoe(), dense(config())
    tied = config(8, 4).model_copy(update={"k": FULL_NORM})
    for cfg, reason in ((tied, "normalised over all heads"), (config(out=False), "add them up")):
        refusal = made.check(cfg, AttnMoeOptions())
        assert refusal is not None and reason in refusal.reason
    assert made.check(tied, AttnMoeOptions(experts=1)) is None
    assert experts(block, experts=1) is block


def test_a_model_stays_what_it_was_and_generates(tmp_path: Any) -> None:
    """Reported as exact, equal to the original, saved, loaded and decoded with a cache."""
    model = decoder("llama", layers=2, groups=2)
    rule = {"layers": [0], "to": "attn-moe", "kv": "separate"}
    other = {"sites": "*", "to": "attn-moe", "experts": 3}
    result = convert(model, plan={"rules": [rule, other]}, out=tmp_path / "m")
    assert [s.exactness for s in result.report.sites] == ["exact", "exact"]
    assert result.report.parity[0].name == "equals the original"
    assert result.report.totals.cache_ratio == pytest.approx(1.5)
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    got = load(tmp_path / "m").generate(ids, **run)
    assert bool((got == model.generate(ids, use_cache=False, **run)).all())
