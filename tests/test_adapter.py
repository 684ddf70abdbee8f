"""The cache matrix: every way transformers decodes, on every mix of converted layers.

Each cell equals uncached greedy decoding (or the original's own beams), or raises a named
error; it never silently differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import MODELS, decoder, prompts
from torch import Tensor
from transformers import (
    DynamicCache,
    StaticCache,
)

from reattend import convert
from reattend.errors import ArgumentError
from reattend.sharing import address

CHOSEN = {"first": [0], "middle": [1], "all": [0, 1, 2]}
NEW = 24


def build(name: str) -> Any:
    return decoder(name, layers=3, groups=2)


def converted(name: str, which: str, to: str = "mla") -> Any:
    rule: dict[str, Any] = {"layers": CHOSEN[which], "to": to}
    if to == "mla":
        rule |= {"kv_lora_rank": 14, "qk_rope_head_dim": 8}
    data = torch.randint(3, 97, (8, 40))
    return convert(build(name), plan={"rules": [rule]}, data=data).model


def greedy_without_cache(model: Any, ids: Tensor, mask: Tensor, new: int = NEW) -> Tensor:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=False
    )


def first_difference_is_a_tie(model: Any, a: Tensor, b: Tensor, mask: Tensor) -> bool:
    """Whether sequences part only where two logits are within rounding of each other."""
    for row in range(len(a)):
        differs = (a[row] != b[row]).nonzero()
        if not len(differs):
            continue
        at = int(differs[0])
        full = torch.cat([mask, torch.ones(len(a), a.shape[1] - mask.shape[1]).long()], 1)
        position = (full.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(
                a[:, :at], attention_mask=full[:, :at], position_ids=position[:, :at],
                use_cache=False,
            ).logits[row, -1]  # fmt: skip
        gap = float((logits[a[row, at]] - logits[b[row, at]]).abs())
        if gap > 1e-4:
            return False
    return True


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Any]:
    return {}


def cached_model(models: dict[tuple[str, str], Any], name: str, which: str) -> Any:
    if (name, which) not in models:
        models[name, which] = converted(name, which)
    return models[name, which]


@pytest.mark.parametrize("which", CHOSEN)
@pytest.mark.parametrize("name", MODELS)
class TestMatrix:
    @pytest.mark.smoke
    def test_greedy_left_padded(self, models: Any, name: str, which: str) -> None:
        model = cached_model(models, name, which)
        ids, mask = prompts()
        expected = greedy_without_cache(model, ids, mask)
        got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert first_difference_is_a_tie(model, expected, got, mask)

    def test_beams(self, models: Any, name: str, which: str) -> None:
        model = cached_model(models, name, which)
        ids, mask = prompts()
        run = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
        expected = model.generate(ids, attention_mask=mask, use_cache=False, **run)
        got = model.generate(ids, attention_mask=mask, **run)
        assert bool((expected == got).all())

    def test_chunked_prefill(self, models: Any, name: str, which: str) -> None:
        model = cached_model(models, name, which)
        ids, mask = prompts()
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=model.config)
        parts = []
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
            for start, end in ((0, 5), (5, 6), (6, 13)):
                out = model(
                    ids[:, start:end], attention_mask=mask[:, :end],
                    position_ids=position[:, start:end], past_key_values=cache, use_cache=True,
                )  # fmt: skip
                parts.append(out.logits)
        real = mask.bool()
        gap = (torch.cat(parts, 1) - whole)[real].abs().max()
        assert gap <= 2e-5 * whole[real].abs().max()

    def test_static(self, models: Any, name: str, which: str) -> None:
        model = cached_model(models, name, which)
        ids, mask = prompts()
        expected = greedy_without_cache(model, ids, mask)
        cache = StaticCache(config=model.config, max_cache_len=64)
        got = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, past_key_values=cache
        )
        assert first_difference_is_a_tie(model, expected, got, mask)

    def test_prompt_lookup(self, models: Any, name: str, which: str) -> None:
        model = cached_model(models, name, which)
        ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
        mask = torch.ones_like(ids)
        expected = greedy_without_cache(model, ids, mask)
        got = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
            prompt_lookup_num_tokens=3,
        )  # fmt: skip
        assert first_difference_is_a_tie(model, expected, got, mask)

    def test_second_generate_on_a_returned_cache(self, models: Any, name: str, which: str) -> None:
        model = cached_model(models, name, which)
        ids, mask = prompts()
        ids, mask = ids[:1], mask[:1]
        expected = greedy_without_cache(model, ids, mask, NEW)
        first = model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        full = torch.cat([mask, torch.ones(1, 9).long()], 1)
        got = model.generate(
            first.sequences, attention_mask=full, past_key_values=first.past_key_values,
            max_new_tokens=NEW - 9, do_sample=False,
        )  # fmt: skip
        assert first_difference_is_a_tie(model, expected, got, mask)


@pytest.mark.smoke
def test_cache_holds_exactly_r_plus_rope_numbers_per_token() -> None:
    model = converted("llama", "all")
    ids, mask = prompts()
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    tokens = ids.shape[0] * (ids.shape[1] + 3)
    for layer in out.past_key_values.layers:
        held = layer.keys.numel() + layer.values.numel()
        assert held == tokens * (14 + 8)
        assert layer.keys.element_size() == 4


def test_attention_weights_are_refused_not_silently_missing() -> None:
    model = converted("llama", "middle")
    ids, mask = prompts()
    with pytest.raises(ArgumentError, match="attention weights"):
        model(ids, attention_mask=mask, output_attentions=True)


@pytest.mark.smoke
def test_the_original_is_untouched_and_shares_what_did_not_change() -> None:
    original = build("llama")
    before = {n: p.clone() for n, p in original.named_parameters()}
    result = convert(original, plan="identity")
    theirs, ours = dict(original.named_parameters()), dict(result.model.named_parameters())
    assert all(bool((before[n] == p).all()) for n, p in theirs.items())
    shared = "model.layers.0.mlp.up_proj.weight"
    assert address(theirs[shared]) == address(ours[shared])
    moved = theirs["model.layers.0.self_attn.q_proj.weight"]
    assert address(moved) == address(ours["model.layers.0.self_attn.mixer.q_proj.weight"])


def test_inplace_changes_the_given_model() -> None:
    original = build("llama")
    result = convert(original, plan="identity", inplace=True)
    assert result.model is original
    assert any("mixer" in name for name, _ in original.named_parameters())


def test_the_attention_implementation_may_be_switched() -> None:
    """Other implementations only change the mask the model passes; FlexAttention's is refused."""
    model = converted("llama", "all")
    ids, mask = prompts()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        model.set_attn_implementation("eager")
        got = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ArgumentError, match="BlockMask"):
            model(ids, attention_mask=mask, use_cache=False)
