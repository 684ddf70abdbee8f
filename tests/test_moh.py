"""Mixture-of-Heads: exact where nothing is left out, else the paper's formulas; refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import CASES, HIDDEN, config, dense, moments
from moh_blocks import WAYS, gates, routed, shaken, wide
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.mixers.config import NormConfig, StreamConfig
from reattend.mixers.kinds import build_mixer
from reattend.parts import reordered
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.mixed import Mixed, MixedOptions, PartOptions
from reattend.passes.rewrite.moh import ToMoh
from reattend.passes.rewrite.moh_options import MohOptions
from reattend.passes.rewrite.registry import conversion
from reattend.plan import Plan

NEUTRAL: dict[str, dict[str, Any]] = {
    "exact": ToMoh().exact_setting(config()).model_dump(),
    "head": {"route": "head"},
    "fitted": {"route": "head", "gate": "hard", "router_start": "output-norm"},
    "moved": {"gate": "hard", "router": "qnorm", "order": (2, 0, 3, 1)},
}


def inputs(n: int, pads: tuple[int, ...] = (0, 5)) -> tuple[Tensor, Tensor]:
    """Hidden states and validity, padded on the left."""
    x = torch.randn(len(pads), n, HIDDEN, dtype=torch.float64)
    return x, torch.arange(n)[None] >= torch.tensor(pads)[:, None]


def gap(a: Tensor, b: Tensor, real: Tensor) -> float:
    return float((a - b)[real].abs().max() / b[real].abs().max())


@pytest.mark.parametrize("way", NEUTRAL)
@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].out_features])
def test_a_start_that_leaves_nothing_out_equals_the_original(name: str, way: str) -> None:
    """KV groups are moved where importance says so, and every gate is exactly 1."""
    block = dense(wide(CASES[name]))
    mixer = routed(block, trained=False, **NEUTRAL[way])
    x, real = inputs(12)
    ctx = Context(mask=real)
    with torch.no_grad():
        assert gap(mixer(x, ctx), block(x, ctx), real) <= 1e-12
        (_, routes), _ = mixer.project(x, x, ctx, None)
    assert bool((routes.gate_BUN == 1).all())
    assert way != "moved" or mixer.config.order == (2, 0, 3, 1)


@pytest.mark.parametrize("way", WAYS)
def test_heads_weigh_what_the_paper_says(way: str) -> None:
    """torch's own attention with its heads weighed by the formulas, in plain numbers."""
    block = dense(wide(config()))
    mixer = routed(block, **WAYS[way])
    x, _ = inputs(9)
    with torch.no_grad():
        got = mixer(x, Context())
        ((q, _, _), routes), (k, v) = mixer.project(x, x, Context(), None)
        y = scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=0.3
        )
        weights = gates(mixer, x, q)
        expected = mixer.o_proj((y * weights[..., None]).transpose(1, 2).flatten(2))
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    used = (weights > 0).double().mean((0, 2)).tolist()
    assert sum(used) / 8 == pytest.approx(mixer.config.active)
    assert routes.active_BUN is not None
    active_BHN = routes.active_BUN.repeat_interleave(mixer.config.heads_per_unit, 1)
    assert torch.equal(active_BHN, weights > 0)


def test_an_untrained_router_leaves_out_the_least_important_groups() -> None:
    """Scores tell them: group 2 adds most to the output, group 0 least."""
    block = dense(wide(config()))
    with torch.no_grad():
        for group, size in enumerate((0.1, 1.0, 9.0, 3.0)):
            block.o_proj.weight.unflatten(1, (4, -1))[:, group] *= size
    mixer = routed(block, trained=False, shared=1, top_k=2)
    assert mixer.config.order == (2, 3, 1, 0)
    x, _ = inputs(7)
    with torch.no_grad():
        without = dense(wide(config()))
        without.load_state_dict(block.state_dict())
        without.o_proj.weight.unflatten(1, (4, -1))[:, 0] = 0
        expected = without(x, Context())
        assert (mixer(x, Context()) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("route", "units"), [("head", 8), ("kv-group", 4)])
def test_a_fitted_router_ranks_what_units_add_to_the_output(route: str, units: int) -> None:
    """By least squares on the logarithm of the size of every unit alone, less their mean."""
    block = dense(wide(config(bias=True)))
    given = MohOptions(
        route=route, shared=0, select_shared="first", gate="hard", router_start="output-norm",
        top_k=2,
    )  # fmt: skip
    found = moments(block)
    mixer: Any = ToMoh().build(block, found, given).mixer
    alone = []
    with torch.no_grad():
        for unit in range(units):
            only = copy.deepcopy(block)
            kept = torch.zeros_like(only.o_proj.weight)
            columns = kept.unflatten(1, (units, -1))
            columns[:, unit] = only.o_proj.weight.unflatten(1, (units, -1))[:, unit]
            only.o_proj.weight.copy_(kept)
            outs = [only(row[None], Context())[0] for row in found.samples]
            alone.append(torch.cat(outs).norm(dim=-1).log())
    x, target = torch.cat(found.samples), torch.stack(alone, 1)
    target = target - target.mean(1, keepdim=True)
    more = (1e-3 * x.square().sum() / x.shape[1]) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)
    zeros = torch.zeros(x.shape[1], units, dtype=x.dtype)
    wanted = torch.linalg.lstsq(torch.cat([x, more]), torch.cat([target, zeros])).solution.t()
    assert torch.allclose(mixer.router.routed.weight, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("way", ["hard", "one"])
def test_a_gate_of_one_passes_on_the_gradient_of_its_probability(way: str) -> None:
    mixer = routed(dense(wide(config())), **WAYS[way])
    x, _ = inputs(6)
    (_, routes), _ = mixer.project(x, x, Context(), None)
    pull = torch.randn_like(routes.gate_BUN)
    (routes.gate_BUN * pull).sum().backward()
    got = mixer.router.routed.weight.grad.clone()
    mixer.zero_grad()
    z = torch.nn.functional.linear(x, mixer.router.routed.weight)
    (z.softmax(-1) * pull[:, mixer.config.shared :].transpose(1, 2)).sum().backward()
    assert torch.allclose(got, mixer.router.routed.weight.grad, rtol=1e-9, atol=1e-12)


def test_groups_in_another_order_are_the_same_block() -> None:
    for name in ("bias", "qk-norm", "sinks", "alibi", "relative", "gate-per-head"):
        block = dense(wide(CASES[name]))
        moved = reordered(block, (2, 0, 3, 1))
        x, real = inputs(8)
        with torch.no_grad():
            expected = block(x, Context(mask=real))
            assert gap(moved(x, Context(mask=real)), expected, real) <= 1e-12
        assert torch.equal(moved.k_proj.weight[:8], block.k_proj.weight[16:24])


FULL_NORM = StreamConfig(norm=NormConfig(kind="rms", scope="full", eps=1e-6))
FITTED = {"gate": "hard", "router_start": "output-norm", "select_shared": "first"}
REFUSED = {
    "top_k 4 is larger than the 3 routed KV groups": (config(8, 4), {"shared": 1, "top_k": 4}),
    "2 shared and 1 routed KV groups are 3, and the block has 4": (
        config(8, 4), {"shared": 2, "routed": 1},
    ),
    "3 shared query heads are not whole KV groups: 2 query heads": (
        config(8, 4), {"shared": 3, "route": "head"},
    ),
    "top_k 0": (config(8, 4), {"top_k": 0}),
    "of 1 KV groups is all of them": (config(4, 1), {}),
    "top_k: 0.5 of 1 routed KV groups is all of them": (config(), {"top_k": 0.5}),
    "normalised over all heads at once; set select_shared: first": (
        config(8, 4).model_copy(update={"k": FULL_NORM}), {},
    ),
    "output-norm: importance is measured without the model": (
        config(8, 4).model_copy(
            update={"core": config(8, 4).core.model_copy(update={"pattern": "opaque"})}
        ),
        FITTED,
    ),
    "the mask is the model's own": (
        config(8, 4).model_copy(
            update={"core": config(8, 4).core.model_copy(update={"pattern": "opaque"})}
        ),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused(reason: str) -> None:
    cfg, options = REFUSED[reason]
    refusal = ToMoh().check(cfg, MohOptions(**options))
    assert refusal is not None and reason in refusal.reason


def test_counts_are_numbers_shares_or_one_per_layer() -> None:
    made, cfg = ToMoh(), config(12, 6)
    given = MohOptions(shared=(1, 0.5), top_k=(0.5, 2), route="head", select_shared="first")
    assert "not whole KV groups" in str(made.check(cfg, made.for_layer(given, 0, 2)))  # type: ignore[arg-type]
    described = made.outcome(cfg, made.for_layer(given, 1, 2))  # type: ignore[arg-type]
    assert (described.shared, described.top_k, described.routed) == (6, 2, 6)
    assert "lists 2 layers, the stack has 3" in str(made.for_layer(given, 0, 3))
    assert made.outcome(cfg, MohOptions(shared=0.25, top_k=0.5)).top_k == 2
    with pytest.raises(ValidationError, match="use gate: hard"):
        MohOptions(router="qnorm")


@pytest.mark.parametrize(
    ("name", "share"), [("moh", 0.75), ("moh-vit", 0.75), ("moh-llama3", 0.75)]
)
def test_presets_are_of_published_sizes(name: str, share: float) -> None:
    """On the shape of Llama 3 8B; what a token uses shows in the forecast."""
    options, cfg = Plan.load(name).rules[0].options, config(32, 8)
    assert ToMoh().check(cfg, options) is None
    assert ToMoh().outcome(cfg, options).active == share
    before, after = dense_cost(cfg), ToMoh().cost(cfg, options)
    attention = 2 * 32 * (8 + 8) * before.context
    router = after.parameters - before.parameters
    assert after.flops_per_token == before.flops_per_token - (1 - share) * attention + 2 * router
    assert (router == 0) == (options.router == "qnorm")


def test_a_converted_model_is_forecast_reported_saved_and_loaded(tmp_path: Any) -> None:
    """Everything the pipeline checks of a plan by itself, once."""
    model = decoder("llama", layers=2, groups=4)
    rule = {"sites": "*", "to": "moh", "shared": [1, 2], "top_k": [2, 0.5]}
    data = torch.randint(3, 97, (8, 20))
    result = convert(model, plan={"rules": [rule]}, data=data, out=tmp_path / "m")
    first, second = result.report.sites
    assert (first.exactness, first.options["top_k"], second.options["top_k"]) == (
        "learned", "2 of 3", "1 of 2",
    )  # fmt: skip
    order = result.model.model.layers[1].self_attn.mixer.config.order
    assert second.options["kv_groups_always_read"] == ", ".join(map(str, sorted(order[:2])))
    assert second.options["kv_groups_read"] == "3 of 4"
    assert first.head_use == (1, 1, 0)  # untrained: the more important ones of the others
    assert second.head_use == (1, 0)
    assert result.report.totals.cache_ratio == 1
    routers = 32 * sum(r + s + 2 for s, r in ((1, 3), (2, 2)))
    grown = result.report.model.parameters_after - result.report.model.parameters_before
    assert grown == routers
    ids = torch.randint(3, 97, (2, 15))
    loaded = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    mixer = shaken(loaded).model.layers[0].self_attn.mixer
    again = build_mixer(**mixer.described())
    again.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        x = torch.randn(1, 9, 32)
        assert torch.equal(again(x, Context()), mixer(x, Context()))


def test_heads_of_some_groups_only_are_routed() -> None:
    """A plan's `heads`: groups 0 and 2 stay dense, 1 and 3 are chosen from."""
    block = dense(wide(config()))
    options = MohOptions(shared=0, top_k=1, select_shared="first")
    parts = (
        PartOptions(heads=(0, 2), to="dense", options=conversion("dense").Options()),
        PartOptions(heads=(1, 3), to="moh", options=options),
    )
    assert Mixed().check(block.config, MixedOptions(groups=parts)) is None
    mixer = Mixed().build(block, None, MixedOptions(groups=parts)).mixer
    x, _ = inputs(9)
    with torch.no_grad():
        got = mixer(x, Context())
        # an untrained router takes the first of the two: group 1
        block.o_proj.weight.unflatten(1, (4, -1))[:, 3] = 0
        expected = block(x, Context())
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
