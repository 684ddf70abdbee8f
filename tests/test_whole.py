"""A block whose own steps mix tokens is carried; it takes a sequence whole and refuses a cache."""

from __future__ import annotations

from typing import Any

import decoder_models
import pytest
import torch
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.errors import UnsupportedCacheError


class Shifted(nn.Module):
    """A projection that also reads the token before."""

    def __init__(self, inside: nn.Linear) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return y + 0.5 * nn.functional.pad(y, (0, 0, 1, 0))[:, :-1]


def shifted() -> Any:
    model = decoder_models.decoder("llama", 2, 2)
    attention = model.model.layers[1].self_attn
    attention.q_proj = Shifted(attention.q_proj)
    return model


def test_it_is_converted_and_refuses_to_continue() -> None:
    model = shifted()
    first, second = find_attention(model).sites
    assert (first.spec.whole, second.spec.whole) == (False, True)
    result = convert(model, plan="identity")
    assert [s.owner.lacks for s in result.report.sites if s.owner] == [(), ("KV cache",)]
    ids, _ = decoder_models.prompts()
    with torch.no_grad():  # the first call fills an empty cache, which is the whole sequence
        gap = result.model(ids).logits - model(ids, use_cache=False).logits
    assert gap.abs().max() <= 1e-5
    run: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with pytest.raises(UnsupportedCacheError, match="cannot continue from a cache"):
        result.model.generate(ids, **run)
    expected = model.generate(ids, **run, use_cache=False)
    assert bool((result.model.generate(ids, **run, use_cache=False) == expected).all())
