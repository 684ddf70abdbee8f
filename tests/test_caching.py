"""Encoder-decoder caches, and static caches without padding, under converted layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo_models
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from reattend import convert, find_attention
from reattend.errors import ArgumentError, UnsupportedCacheError
from reattend.install.adapter import Adapter

WHICH = {
    "all": "identity",
    "first": {"rules": [{"sites": "*block.0.*", "to": "dense"}]},
    "last": {"rules": [{"sites": "*block.1.*", "to": "dense"}]},
}
LONG = 140  # beyond the distance at which buckets stop changing


@pytest.fixture(scope="module")
def original() -> Any:
    return zoo_models.build("t5")


@pytest.fixture(scope="module")
def converted(original: Any) -> dict[str, Any]:
    return {name: convert(original, plan=plan).model for name, plan in WHICH.items()}


def prompt() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (3, 13), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, -3:] = 0, 0
    return ids, mask, torch.randint(3, 97, (3, LONG), generator=generator)


def step_by_step(model: Any, cache: Any, chunks: list[int]) -> Tensor:
    """Logits of given decoder tokens through a cache, in pieces."""
    ids, mask, tokens = prompt()
    rows, at = [], 0
    with torch.no_grad():
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
        for size in chunks:
            out = model(
                encoder_outputs=encoded, attention_mask=mask, use_cache=True,
                decoder_input_ids=tokens[:, at : at + size], past_key_values=cache,
            )  # fmt: skip
            rows.append(out.logits)
            at += size
    return torch.cat(rows, 1)


def at_once(model: Any) -> Tensor:
    ids, mask, tokens = prompt()
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, use_cache=False
        ).logits


def dynamic(_: Any) -> Any:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def static(model: Any) -> Any:
    config = model.config
    return EncoderDecoderCache(
        StaticCache(config=config, max_cache_len=LONG + 9),
        StaticCache(config=config, max_cache_len=13),
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("make", [dynamic, static])
def test_decoding_equals_the_original_far_out(
    original: Any, converted: Any, which: str, make: Any
) -> None:
    expected = at_once(original)
    chunks = [20] + [1] * 100 + ([20] if make is dynamic else [1] * 20)
    got = step_by_step(converted[which], make(original), chunks)
    floor = float((step_by_step(original, make(original), chunks) - expected).abs().max())
    assert floor <= 1e-4  # the original's own difference between cached and not
    assert (got - expected).abs().max() <= max(2e-4, 4 * floor)


@pytest.mark.parametrize("which", WHICH)
def test_beams_equal_the_original(original: Any, converted: Any, which: str) -> None:
    ids, mask, _ = prompt()
    run = {"attention_mask": mask, "max_new_tokens": 24, "num_beams": 3, "do_sample": False}
    assert torch.equal(original.generate(ids, **run), converted[which].generate(ids, **run))


def test_encoder_states_are_projected_once(converted: Any) -> None:
    model, counted = converted["all"], []
    crossing = [m.mixer for m in model.modules() if isinstance(m, Adapter) and m.mixer.config.cross]
    handles = [m.k_proj.register_forward_hook(lambda *_: counted.append(1)) for m in crossing]
    ids, mask, _ = prompt()
    model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for handle in handles:
        handle.remove()
    assert len(crossing) == len(counted) == 2


def test_the_binding_names_part_and_layer(original: Any) -> None:
    parts = [
        (s.path.split(".")[-1], s.binding.cache_part, s.binding.layer_idx)
        for s in find_attention(original).sites
        if s.binding is not None and s.binding.cache is not None
    ]
    assert parts == [
        ("SelfAttention", "self_attention_cache", 0),
        ("EncDecAttention", "cross_attention_cache", 0),
        ("SelfAttention", "self_attention_cache", 1),
        ("EncDecAttention", "cross_attention_cache", 1),
    ]


def test_another_cache_is_refused(converted: Any) -> None:
    adapter = converted["all"].decoder.block[0].layer[1].EncDecAttention
    x = torch.randn(1, 2, 32)
    with pytest.raises(UnsupportedCacheError, match="DynamicCache"):
        adapter(x, key_value_states=torch.randn(1, 5, 32), past_key_values=DynamicCache())
    with pytest.raises(ArgumentError, match="without encoder states"):
        adapter(x)


@pytest.mark.daily
@pytest.mark.parametrize("to", ["dense", "mla"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_static_cache_without_padding(name: str, to: str) -> None:
    """transformers passes no mask here: empty slots of the cache must stay unseen."""
    rule: dict[str, Any] = {"sites": "*", "to": to}
    if to == "mla":
        rule |= {"kv_lora_rank": 14, "qk_rope_head_dim": 8}
    data = torch.randint(3, 97, (8, 40))
    model = convert(zoo_models.build(name), plan={"rules": [rule]}, data=data).model
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(2))
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        parts = [
            model(ids[:, a:b], past_key_values=cache, use_cache=True).logits
            for a, b in ((0, 15), (15, 16), (16, 20))
        ]
    assert (torch.cat(parts, 1) - expected).abs().max() <= 1e-5 * float(expected.abs().max())
