"""Caches of routed blocks: every way transformers decodes, and the bytes held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_matrix import CHOSEN, CacheMatrix
from decoder_models import decoder
from moh_blocks import shaken
from transformers import DynamicCache

from reattend import convert

RULES: dict[str, dict[str, Any]] = {
    "llama": {"shared": 0, "top_k": 1},
    "gemma2": {"shared": 2, "top_k": 1, "route": "head"},
    "mistral": {"shared": 0, "top_k": 2, "route": "head", "gate": "hard", "router": "qnorm"},
}
QUICK = [("llama", "all"), ("gemma2", "first")]
CELLS = [*QUICK, ("mistral", "all"), ("gemma2", "all"), ("llama", "middle")]
_MADE: dict[tuple[str, str], Any] = {}


def routed(name: str, which: str) -> Any:
    if (name, which) not in _MADE:
        rule = {"layers": CHOSEN[which], "to": "moh", **RULES[name], "select_shared": "first"}
        model = convert(decoder(name, layers=3, groups=2), plan={"rules": [rule]}).model
        _MADE[name, which] = shaken(model)
    return _MADE[name, which]


@pytest.mark.parametrize(
    ("name", "which"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS],
)
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return routed(name, which)


def test_a_cache_holds_every_group_of_every_token() -> None:
    model = routed("llama", "all")
    original = decoder("llama", layers=3, groups=2)
    ids = torch.randint(3, 97, (2, 21))
    held = []
    for one in (model, original):
        cache = DynamicCache(config=one.config)
        with torch.no_grad():
            one(ids, past_key_values=cache)
        held.append([(t.shape, t.nbytes) for c in cache.layers for t in (c.keys, c.values)])
    assert held[0] == held[1] == [((2, 2, 21, 8), 2 * 2 * 21 * 8 * 4)] * 6
