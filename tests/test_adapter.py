"""The cache matrix on every mix of converted layers, and what an adapter refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cache_matrix import CHOSEN, CacheMatrix
from decoder_models import MODELS, decoder, prompts

from reattend import convert
from reattend.errors import ArgumentError
from reattend.install.adapter import replace_module
from reattend.sharing import address


def build(name: str) -> Any:
    return decoder(name, layers=3, groups=2)


def converted(name: str, which: str, to: str = "mla") -> Any:
    rule: dict[str, Any] = {"layers": CHOSEN[which], "to": to}
    if to == "mla":
        rule |= {"kv_lora_rank": 14, "qk_rope_head_dim": 8}
    data = torch.randint(3, 97, (8, 40))
    return convert(build(name), plan={"rules": [rule]}, data=data).model


_MADE: dict[tuple[str, str], Any] = {}


def made(name: str, which: str) -> Any:
    """A converted model, made once and not to be changed.

    Some layers alone are converted of Gemma 2, whose layers are of two kinds; in the other mixes
    blocks of the model that was converted whole stand in an original.
    """
    if (name, which) in _MADE:
        return _MADE[name, which]
    if which == "all" or (name, which) == ("gemma2", "first"):
        model = converted(name, which)
    else:
        model, whole = build(name), made(name, "all")
        for layer in CHOSEN[which]:
            path = f"model.layers.{layer}.self_attn"
            replace_module(model, path, whole.get_submodule(path))
    _MADE[name, which] = model
    return model


@pytest.mark.parametrize("which", CHOSEN)
@pytest.mark.parametrize("name", MODELS)
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return made(name, which)


@pytest.mark.smoke
def test_cache_holds_exactly_r_plus_rope_numbers_per_token() -> None:
    model = made("llama", "all")
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
    model = made("llama", "middle")
    ids, mask = prompts()
    with pytest.raises(ArgumentError, match="attention weights"):
        model(ids, attention_mask=mask, output_attentions=True)


@pytest.mark.smoke
def test_the_original_is_untouched_and_shares_what_did_not_change() -> None:
    original = decoder("llama", layers=1, groups=2)
    before = {n: p.clone() for n, p in original.named_parameters()}
    result = convert(original, plan="identity")
    theirs, ours = dict(original.named_parameters()), dict(result.model.named_parameters())
    assert all(bool((before[n] == p).all()) for n, p in theirs.items())
    shared = "model.layers.0.mlp.up_proj.weight"
    assert address(theirs[shared]) == address(ours[shared])
    moved = theirs["model.layers.0.self_attn.q_proj.weight"]
    assert address(moved) == address(ours["model.layers.0.self_attn.mixer.q_proj.weight"])


def test_inplace_changes_the_given_model() -> None:
    original = decoder("llama", layers=1, groups=2)
    result = convert(original, plan="identity", inplace=True)
    assert result.model is original
    assert any("mixer" in name for name, _ in original.named_parameters())


@pytest.mark.slow
def test_the_attention_implementation_may_be_switched() -> None:
    """Other implementations only change the mask the model passes; FlexAttention's is refused."""
    model = copy.deepcopy(made("llama", "all"))
    ids, mask = prompts()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        model.set_attn_implementation("eager")
        got = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ArgumentError, match="BlockMask"):
            model(ids, attention_mask=mask, use_cache=False)
