"""Caches of routed blocks: every way transformers decodes, and the bytes held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_matrix import CHOSEN, CacheMatrix
from decoder_models import decoder, prompts
from moh_blocks import shaken
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from reattend import convert

RULES: dict[str, dict[str, Any]] = {
    "llama": {"shared": 0, "top_k": 1},
    "gemma2": {"shared": 2, "top_k": 1, "route": "head"},
    "mistral": {"shared": 0, "top_k": 2, "route": "head", "gate": "hard", "router": "qnorm"},
}
QUICK = [("llama", "all")]
CELLS = [*QUICK, ("gemma2", "first"), ("mistral", "all"), ("gemma2", "all"), ("llama", "middle")]
_MADE: dict[tuple[str, str], Any] = {}


def routed(name: str, which: str) -> Any:
    if (name, which) not in _MADE:
        rule = {"layers": CHOSEN[which], "to": "moh", **RULES[name], "select_shared": "first"}
        model = convert(decoder(name, layers=3, groups=2), plan={"rules": [rule]}).model
        _MADE[name, which] = shaken(model)
    return _MADE[name, which]


@pytest.fixture(autouse=True)
def _leaving_out_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models are so small that computing every head is faster."""
    monkeypatch.setattr("reattend.mixers.routed.pays", lambda *_: True)


@pytest.mark.parametrize(
    ("name", "which"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in CELLS],
)
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return routed(name, which)


def test_generating_computes_only_the_heads_that_are_used() -> None:
    """Of 2 KV groups each token reads 1; keys that nobody reads may be anything."""
    model, (ids, mask) = routed("llama", "all"), prompts()
    used: list[tuple[int, int, int]] = []
    op = torch.ops.reattend.routed_attention.default

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is op:
                used.append((args[0].shape[2], args[1].shape[2], int(args[3].sum())))
            return func(*args, **kwargs or {})

    with Watch():
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert used == [(n, m, 3 * n) for n, m in ((13, 13), (1, 14), (1, 15)) for _ in range(3)]


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
