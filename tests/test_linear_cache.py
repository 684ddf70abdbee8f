"""Caches of linear blocks: the ways transformers decodes, constant bytes, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_matrix import CHOSEN, CacheMatrix
from decoder_models import decoder, prompts
from transformers import DynamicCache, StaticCache

from reattend import convert
from reattend.errors import UnsupportedCacheError
from reattend.install.held import HeldLayer
from reattend.plan import Plan

RULES: dict[str, dict[str, Any]] = {
    "all": {"window": 5, "window_form": "terraced"},
    "middle": {"window": 4, "window_form": "sliding", "decay": "fixed", "state": "per-kv-head"},
    "first": {"window": 0, "feature_map": "elu+1"},
}
#: the middle layer of "all": the options of the preset `liger`, with a smaller window
LIGER = {**Plan.load("liger").to_dict()["rules"][0], "window": 6}
CELLS = [("llama", "all"), ("llama", "middle"), ("llama", "first")]
_MADE: dict[str, Any] = {}


def linear(which: str) -> Any:
    if which not in _MADE:
        rules = [{"layers": CHOSEN[which], "to": "linear", **RULES[which]}]
        if which == "all":
            rules.insert(0, {**LIGER, "sites": "*", "layers": [1]})
        _MADE[which] = convert(decoder("llama", layers=3, groups=2), plan={"rules": rules}).model
    return _MADE[which]


@pytest.mark.parametrize(
    ("name", "which"),
    [pytest.param(*cell, marks=() if cell == CELLS[0] else pytest.mark.slow) for cell in CELLS],
)
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return linear(which)

    def test_static(self, name: str, which: str) -> None:
        """A static cache holds what it was made to hold: refused, by name."""
        cache = StaticCache(config=self.model(name, which).config, max_cache_len=64)
        ids, mask = prompts()
        with pytest.raises(UnsupportedCacheError, match="layer of type Static"):
            self.model(name, which)(ids, attention_mask=mask, past_key_values=cache)

    def test_prompt_lookup(self, name: str, which: str) -> None:
        """A wrong guess would have to be taken back out of a sum: refused, by name."""
        ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
        with pytest.raises(UnsupportedCacheError, match="do not forget single tokens"):
            self.model(name, which).generate(
                ids, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3
            )


def test_a_cache_is_as_large_after_200_tokens_as_after_20() -> None:
    model = linear("all")
    c = model.model.layers[0].self_attn.mixer.config
    sizes = []
    for n in (20, 77, 200):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.randint(3, 97, (2, n)), past_key_values=cache)
            model(torch.randint(3, 97, (2, 1)), past_key_values=cache)
        assert all(isinstance(layer, HeldLayer) for layer in cache.layers)
        assert cache.get_seq_length() == n + 1
        sizes.append(sum(t.nbytes for layer in cache.layers for t in layer.rows))
    # keys and values of two terraces, and for each query head a state with a column of sums
    terraced = c.core.heads * 2 * 8 * (8 + 1) + 2 * 5 * 2 * (8 + 8)
    gated = 2 * 8 * 8 + 6 * 2 * (8 + 8)  # one state per KV head, and a window of 6
    assert sizes == [2 * 4 * (2 * terraced + gated)] * 3


def test_rows_of_the_batch_can_be_repeated_selected_and_forgotten() -> None:
    model = linear("all")
    ids = torch.randint(3, 97, (2, 20))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        got = model(ids.flip(0)[:, -1:], past_key_values=cache).logits[:, -1]
        expected = model(ids.flip(0), use_cache=False).logits[:, -1]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    cache.reset()
    assert cache.get_seq_length() == 0
