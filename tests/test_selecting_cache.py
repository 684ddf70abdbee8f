"""Blocks that select keys, with caches: decoding equals one pass, what is held, what is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_matrix import CacheMatrix
from decoder_models import decoder, prompts
from transformers import DynamicCache, StaticCache

from reattend import convert
from reattend.errors import UnsupportedCacheError

MOBA = {"select": {"kind": "blocks", "block": 4, "topk": 3}}
_MADE: dict[str, Any] = {}


def routed() -> Any:
    if "moba" not in _MADE:
        rule = {"sites": "*", "to": "sparse", "pattern": MOBA}
        _MADE["moba"] = convert(decoder("llama", layers=3, groups=2), plan={"rules": [rule]})
    return _MADE["moba"]


@pytest.mark.parametrize(("name", "which"), [("llama", "all")])
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return routed().model

    def test_static(self, name: str, which: str) -> None:
        model = self.model(name, which)
        cache = StaticCache(config=model.config, max_cache_len=64)
        ids, mask = prompts()
        with pytest.raises(UnsupportedCacheError, match="layer of type Static"):
            model(ids, attention_mask=mask, past_key_values=cache)


def test_a_cache_holds_the_mean_of_every_whole_block() -> None:
    model = routed().model
    ids, mask = prompts()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        layer = cache.layers[1]
        keys, _, place = layer.parts[0]
        held = layer.memos[0].rows_BGQw
        for row, pad in enumerate((0, 3, 7)):
            for b in range((13 - pad) // 4):
                mine = (place[row] >= 4 * b) & (place[row] < 4 * b + 4)
                expected = keys[row][:, mine].mean(1)
                assert torch.allclose(held[row, :, b], expected, atol=1e-6)
        assert sum(t.numel() for t in layer.rows) == 2 * keys.numel() + held.numel()
        cache.crop(-6)  # and then other tokens, which are summarised anew
        other = torch.randint(3, 97, (3, 6))
        got = model(other, attention_mask=mask, past_key_values=cache).logits
        both = torch.cat([ids[:, :7], other], 1)
        real = mask.clone()
        expected = model(both, attention_mask=real, use_cache=False).logits[:, 7:]
    assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_the_report_says_what_is_read_and_held() -> None:
    report = routed().report
    said = report.sites[0].options
    assert said["select"] == "blocks (both)" and "depends" not in str(report.notes)
    assert said["attention_density"].startswith("0.003 in prefill, 0.003")  # 12 of 4096
    assert said["kv_density"] == "1.125"  # a mean key per 4 tokens beside keys and values
    assert [p.verdict for p in report.parity] == ["pass", "pass"]
    before, after = report.sites[0].cost.before, report.sites[0].cost.after
    assert after.cache_numbers_per_token == 1.125 * before.cache_numbers_per_token


CANDIDATES = [
    {"sinks": 2, "window": 6},
    {"select": {"kind": "vertical-slash", "columns": 4, "slashes": 4, "first_columns": 1,
                "last_slashes": 2, "last_queries": 4}},
    {"select": {"kind": "blocks", "block": 4, "topk": 2, "queries": "pooled"}},
]  # fmt: skip


def test_every_head_gets_one_of_the_candidates_and_decoding_is_dense() -> None:
    rule = {"sites": "*", "to": "sparse", "candidates": CANDIDATES, "kv_density": 0.35,
            "density_at": 24}  # fmt: skip
    plan = {"rules": [rule], "calibrate": {"seq_len": 24, "statistics_tokens": 240}}
    original = decoder("llama", layers=2, groups=2)
    result = convert(original, plan=plan, data=torch.randint(3, 97, (12, 24)))
    blocks = [layer.self_attn.mixer.config for layer in result.model.model.layers]
    given = [c.pattern.model_dump(exclude_unset=True) for b in blocks for c in b.classes]
    assert all(pattern in CANDIDATES for pattern in given)
    assert any("select" in pattern for pattern in given)
    assert any("how a text is cut" in note for note in result.report.notes)
    assert not result.report.parity

    rule = {"sites": "*", "to": "sparse", "pattern": CANDIDATES[1]}
    model = convert(original, plan={"rules": [rule]}).model
    ids, _ = prompts()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        for n in range(6):  # token by token nothing is left out
            got = model(ids[:1, n : n + 1], past_key_values=cache).logits
        expected = original(ids[:1, :6]).logits[:, -1:]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
