"""SLA of causal blocks: its choice by loops, exact with all blocks, decoding with it."""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import CASES, config, dense
from pydantic import ValidationError
from test_linear import TAKEN, gap, inputs
from torch import Tensor
from transformers import DynamicCache

from reattend import convert, export
from reattend.errors import RefusedError, UnsupportedCacheError
from reattend.mixers.base import Context
from reattend.passes.rewrite.linear import LinearOptions, ToLinear

OPTIONS: dict[str, Any] = {
    "window": 0, "feature_map": "softmax", "sparse_top": 0.4, "sparse_block": 4,
}  # fmt: skip


def sla(block: Any, trained: bool = True, **options: Any) -> Any:
    """The mixer; `trained`: with a rest."""
    mixer = ToLinear().build(block, None, LinearOptions(**options)).mixer
    if trained:
        torch.manual_seed(7)
        for parameter in mixer.everywhere.parameters():
            parameter.data = parameter + 0.5 * torch.randn_like(parameter)
    return mixer


def by_loops(mixer: Any, x_ND: Tensor) -> Tensor:
    """Query by query."""
    (q, _), new = mixer.project(x_ND[None], x_ND[None], Context(), None)
    c, size = mixer.config, mixer.config.sparse_block
    k, v = (x[0].repeat_interleave(q.shape[1] // x.shape[1], 0) for x in new.rows)
    out, rest = torch.zeros_like(v), mixer.everywhere.rest
    for h in range(len(v)):
        for n in range(len(x_ND)):
            own, query = n // size, q[0, h, n]
            past = sorted(
                range(own), key=lambda b: -float(query @ k[h, b * size : (b + 1) * size].mean(0))
            )
            blocks = [own, *past[: ceil((own + 1) * c.sparse_top) - 1]]
            keys = [j for j in range(n + 1) if j // size in blocks]
            near = (k[h, keys] @ query * c.core.scale).softmax(-1) @ v[h, keys]
            weight = k[h, : n + 1].softmax(-1) @ query.softmax(-1)
            far = weight @ v[h, : n + 1] / weight.sum()
            out[h, n] = near + far @ rest.weight.T + rest.bias
    return mixer.o_proj(out.transpose(0, 1).flatten(1))


def test_every_query_chooses_among_the_blocks_before_its_own() -> None:
    mixer = sla(dense(config()), **OPTIONS)
    x, _ = inputs(27, (0,))
    with torch.no_grad():
        want = by_loops(mixer, x[0])
        assert (mixer(x, Context())[0] - want).abs().max() <= 1e-12 * want.abs().max()
        padded, real = inputs(32, (5,))
        padded[0, 5:] = x[0]
        place = (real.long().cumsum(-1) - 1).clamp_min(0)
        got = mixer(padded, Context(mask=real, position_BN=place))[0, 5:]
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("name", TAKEN)
def test_with_all_blocks_and_nothing_trained_it_is_softmax_attention(name: str) -> None:
    block = dense(CASES[name])
    result = ToLinear().build(block, None, LinearOptions(**{**OPTIONS, "sparse_top": 1.0}))
    assert result.exactness == "exact"
    x, real = inputs(40)
    with torch.no_grad():
        ctx = Context(mask=real)
        assert gap(result.mixer(x, ctx), block(x, ctx), real) <= 1e-12


def test_long_calls_that_gather_blocks_give_the_same_as_a_mask() -> None:
    mixer = sla(dense(config()), **{**OPTIONS, "sparse_block": 64, "sparse_top": 0.3})
    x, _ = inputs(330, (0,))
    learned = mixer(x, Context())  # with gradients: a mask
    learned.sum().backward()
    assert mixer.k_proj.weight.grad is not None
    with torch.no_grad():
        assert (mixer(x, Context()) - learned).abs().max() <= 1e-10


def test_it_costs_what_it_says_and_what_contradicts_it_is_named() -> None:
    mixer, options = sla(dense(config()), **OPTIONS), LinearOptions(**OPTIONS)
    cost = ToLinear().cost(config(), options)
    assert cost.parameters == sum(p.numel() for p in mixer.parameters())
    assert cost.cache == -(-mixer.config.held_after(cost.context) // cost.context)
    assert cost.cache > mixer.config.cache_per_token  # compute is saved, not memory
    for wrong, words in (
        ({"window": 8}, "set window: 0"),
        ({"decay": "fixed"}, "no decay"),
        ({"rope": "window-only"}, "rows are kept once"),
        ({"flow": True, "feature_map": "sigmoid"}, "no sparse_top"),
        ({"feature_map": "performer", "lowrank": True}, "single queries chose"),
        ({"feature_map": "performer", "estimate": 8}, "every later token"),
    ):
        with pytest.raises(ValidationError, match=words):
            LinearOptions(**{**OPTIONS, **wrong})


def test_a_language_model_generates_from_all_rows_and_a_state(tmp_path: Any) -> None:
    rules = [{"sites": "*", "to": "linear", **OPTIONS}]
    model = convert(decoder("llama", layers=2, groups=2), plan={"rules": rules}).model
    ids = torch.randint(3, 97, (3, 19))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    held, c = cache.layers[0], model.model.layers[0].self_attn.mixer.config
    assert sum(t.numel() for t in held.rows) == 3 * c.held_after(19)
    with pytest.raises(UnsupportedCacheError, match="do not forget single tokens"):
        cache.crop(-1)
    with pytest.raises(RefusedError, match="for which there is no node"):
        export(model, out=tmp_path / "x")
