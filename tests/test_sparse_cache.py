"""Caches of sparse blocks: the matrix over three windows of text, bytes held, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_matrix import CHOSEN, NEW, CacheMatrix, greedy_without_cache
from decoder_models import decoder, prompts
from transformers import DynamicCache, StaticCache

from reattend import convert
from reattend.errors import UnsupportedCacheError
from reattend.install.kept import KeptLayer

#: head 0: what a cache may forget; head 1: a pattern that looks back at what it did not see
PATTERNS = {
    "evicting": {"pattern": {"sinks": 2, "window": 7}},
    "strided": {"pattern": {"window": 5, "stride": {"period": 2, "block": 3}}},
    "elastic": {"pattern": {"window": 3, "window_slope": 0.25}, "heads_full": [1]},
    "powers": {"pattern": {"window": 3, "powers": {"block": 2}}},
}


_MADE: dict[tuple[str, str], Any] = {}


def sparse(name: str, which: str) -> Any:
    """Converted once, and not to be changed."""
    if (name, which) not in _MADE:
        rule = {"layers": CHOSEN[which], "to": "sparse", **PATTERNS["evicting"]}
        made = convert(decoder(name, layers=3, groups=2), plan={"rules": [rule]}).model
        _MADE[name, which] = made
    return _MADE[name, which]


#: cells of every day (all layers; one beside a sliding and a full one), and all that are tried: the
#: adapter's own matrix has the others
QUICK = [("llama", "all"), ("gemma2", "first")]
CELLS = [*QUICK, ("mistral", "all"), ("gemma2", "all"), ("llama", "middle")]


@pytest.mark.parametrize(
    ("name", "which"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS],
)
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return sparse(name, which)

    def test_static(self, name: str, which: str) -> None:
        """A static cache holds what it was made to hold: refused, by name."""
        model = self.model(name, which)
        cache = StaticCache(config=model.config, max_cache_len=64)
        ids, mask = prompts()
        with pytest.raises(UnsupportedCacheError, match="layer of type Static"):
            model(ids, attention_mask=mask, past_key_values=cache)


@pytest.fixture(scope="module")
def others() -> Any:
    """A layer of each other pattern; the last one's looks back at what it did not see."""
    torch.set_num_threads(1)
    kinds = [kind for kind in PATTERNS if kind != "evicting"]
    rules = [{"layers": [i], "to": "sparse", **PATTERNS[k]} for i, k in enumerate(kinds)]
    return convert(decoder("llama", layers=len(kinds), groups=2), plan={"rules": rules}).model


def test_other_patterns_decode_alike_with_and_without_a_cache(others: Any) -> None:
    ids, mask = prompts()
    expected = greedy_without_cache(others, ids, mask)
    got = others.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert bool((expected == got).all())


def test_a_cache_holds_sinks_and_window_of_evicting_heads_and_all_of_the_others() -> None:
    rule = {"sites": "*", "to": "sparse", "pattern": {"sinks": 2, "window": 7}, "heads_full": [1]}
    model = convert(decoder("llama", layers=3, groups=2), plan={"rules": [rule]}).model
    ids = torch.randint(3, 97, (2, 40))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)  # now none of the tokens can be taken back
    core = model.model.layers[0].self_attn.mixer.config.core
    each = 2 * (core.qk_head_dim + core.v_head_dim) * 4  # batch, both tensors, float32
    for layer in cache.layers:
        assert isinstance(layer, KeptLayer)
        assert layer.get_seq_length() == 41
        held = [sum(t.nbytes for t in part[:2]) for part in layer.parts]
        assert held == [each * (2 + 6), each * 41]  # the next query brings its own row


def test_nothing_is_forgotten_where_a_pattern_looks_back(others: Any) -> None:
    cache = DynamicCache(config=others.config)
    with torch.no_grad():
        others(torch.randint(3, 97, (1, 40)), past_key_values=cache)
    assert list(PATTERNS)[-1] == "powers"
    assert cache.layers[-1].parts[0][0].shape[2] == 40


def test_cutting_back_further_than_the_cache_can_is_refused() -> None:
    model = sparse("llama", "all")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 100)), past_key_values=cache)
        cache.crop(-30)
        with pytest.raises(UnsupportedCacheError, match="cannot be cut back"):
            cache.crop(-40)


def test_rows_of_the_batch_can_be_repeated_selected_and_forgotten() -> None:
    model = sparse("llama", "all")
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


def test_a_filled_layer_is_not_taken_over() -> None:
    model = sparse("llama", "all")
    cache = DynamicCache(config=model.config)
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(UnsupportedCacheError, match="filled before"):
        model(torch.randint(3, 97, (1, 4)), past_key_values=cache)


MIXED = [
    {"sites": "*", "heads": [0], "to": "sparse", "pattern": {"sinks": 1, "window": 6}},
    {"sites": "*", "heads": [1], "to": "mla", "kv_lora_rank": 8, "qk_rope_head_dim": 4},
]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_sparse_and_latent_heads_share_a_layer(name: str) -> None:
    """One head forgets, the other compresses; greedy and beams equal decoding without a cache."""
    data = torch.randint(3, 97, (8, 40))
    model = convert(decoder(name, layers=3, groups=2), plan={"rules": MIXED}, data=data).model
    ids, mask = prompts()
    expected = greedy_without_cache(model, ids, mask)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    assert bool((expected == got).all())
    run = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **run)
    assert bool((expected == model.generate(ids, attention_mask=mask, **run)).all())
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, 97, (1, 40)), past_key_values=cache)
        model(torch.randint(3, 97, (1, 1)), past_key_values=cache)
    kept, latent = cache.layers[1].groups.values()  # a layer without a window of its own
    assert kept.rows[0].shape[2] == 1 + 5
    assert latent.keys.shape[1:] == (1, 41, 8)
