"""`linear_share`: the blocks that lose least become linear, the others stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import config, dense

from reattend import convert, load
from reattend.errors import PlanError
from reattend.install.held import HeldLayer
from reattend.mixers.linear import LinearAttention
from reattend.passes.rewrite.linear_hybrid import HybridOptions, ToHybrid
from reattend.plan import Plan

RULE: dict[str, Any] = {
    "sites": "*", "to": "linear", "linear_share": 0.5, "window": 4, "feature_dim": 6,
    "feature_init": "uniform",
}  # fmt: skip

OPTIONS = {key: value for key, value in RULE.items() if key not in ("sites", "to")}


def ids(rows: int, tokens: int = 40) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    return torch.randint(3, 97, (rows, tokens), generator=gen)


def test_layers_that_a_state_can_follow_are_taken(tmp_path: Any) -> None:
    """Two layers hardly look at anything in particular, two look far back and sharply."""
    model = decoder("llama", layers=4, groups=2)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].self_attn.q_proj.weight.mul_(12)
        for layer in (1, 3):
            model.model.layers[layer].self_attn.q_proj.weight.mul_(0.01)
    result = convert(model, plan={"rules": [RULE]}, data=ids(8), out=tmp_path / "m")
    kinds = [layer.self_attn.mixer.kind for layer in result.model.model.layers]
    assert kinds == ["dense", "linear", "dense", "linear"]
    sites = result.report.sites
    assert [site.exactness for site in sites] == ["exact", "learned"] * 2
    assert [site.conversion for site in sites] == ["dense", "linear"] * 2
    run = {"max_new_tokens": 9, "do_sample": False}
    loaded = load(tmp_path / "m")
    cached = loaded.generate(ids(2, 9), **run)
    assert torch.equal(cached, loaded.generate(ids(2, 9), use_cache=False, **run))
    cache = loaded(ids(2, 20)).past_key_values
    assert [isinstance(layer, HeldLayer) for layer in cache.layers] == [False, True] * 2


def test_what_a_block_loses_is_measured_on_a_row_that_its_new_weights_did_not_see() -> None:
    torch.manual_seed(0)
    block, options = dense(config()), HybridOptions(**OPTIONS)
    rows = [torch.randn(30, block.config.hidden_size) for _ in range(3)]
    made = ToHybrid()
    before = {n: p.clone() for n, p in block.named_parameters()}
    trained, short = made.error(block, rows, options), made.error(block, rows[-1:], options)
    assert 0 < trained < 1
    assert short != trained
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
    wide = options.model_copy(update={"window": 30})
    assert made.error(block, rows, wide) <= 1e-9


def test_a_share_costs_its_share_until_it_is_chosen() -> None:
    made, share = ToHybrid(), HybridOptions(linear_share=0.25, window=4)
    whole = [
        made.cost(config(), share.model_copy(update={"linear": chosen})) for chosen in (True, False)
    ]
    cost = made.cost(config(), share)
    assert cost.flops_per_token == round(
        0.25 * whole[0].flops_per_token + 0.75 * whole[1].flops_per_token
    )
    assert whole[0].cache < cost.cache < whole[1].cache
    assert made.outcome(config(), share) is None
    assert isinstance(
        made.build(dense(config()), None, share.model_copy(update={"linear": True})).mixer,
        LinearAttention,
    )


def test_rows_shorter_than_the_window_cannot_tell_blocks_apart() -> None:
    with pytest.raises(PlanError, match="older than the window"):
        convert(
            decoder("llama", layers=2, groups=2), plan={"rules": [{**RULE, "window": 48}]},
            data=ids(4),
        )  # fmt: skip
    part = config().model_copy(update={"out_features": None})
    refusal = ToHybrid().check(part, HybridOptions(linear_share=0.5))
    assert refusal is not None and "compares whole blocks" in refusal.reason


def test_decays_by_layer_are_those_of_a_published_model() -> None:
    """Against transformers' MiniMax, which has Lightning Attention."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    size = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "num_hidden_layers": 3}
    options = HybridOptions(**Plan.load("lightning").rules[0].options.model_dump())
    for layer in range(3):
        own = ToHybrid().for_layer(options, layer, 3)
        decay = torch.tensor(ToHybrid().described(config(), own).decay)
        theirs = MiniMaxLightningAttention(MiniMaxConfig(**size), layer).slope_rate.flatten()
        torch.testing.assert_close(-decay, theirs, rtol=1e-6, atol=1e-12)
    other = options.model_copy(update={"decay": "none"})
    assert "set decay: fixed" in ToHybrid().for_layer(other, 0, 3).reason
