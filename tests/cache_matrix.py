"""Every way transformers decodes from a cache, as a class of tests that families inherit.

Each cell equals uncached greedy decoding (or the model's own uncached beams), or raises a named
error; it never silently differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import prompts
from torch import Tensor
from transformers import DynamicCache, StaticCache

CHOSEN = {"first": [0], "middle": [1], "all": [0, 1, 2]}
NEW = 24


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


#: greedy tokens without a cache, by class and cell
_UNCACHED: dict[tuple[type, str, str], Tensor] = {}


class CacheMatrix:
    """Each way; subclasses say what is converted to what."""

    def model(self, name: str, which: str) -> Any:
        """The converted model of one cell."""
        raise NotImplementedError

    def uncached(self, name: str, which: str) -> Tensor:
        """What every way of decoding the prompts has to equal; computed once for a cell."""
        cell = (type(self), name, which)
        if cell not in _UNCACHED:
            _UNCACHED[cell] = greedy_without_cache(self.model(name, which), *prompts())
        return _UNCACHED[cell]

    @pytest.mark.smoke
    def test_greedy_left_padded(self, name: str, which: str) -> None:
        model, expected = self.model(name, which), self.uncached(name, which)
        ids, mask = prompts()
        got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        assert first_difference_is_a_tie(model, expected, got, mask)

    def test_beams(self, name: str, which: str) -> None:
        model = self.model(name, which)
        ids, mask = prompts()
        run = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
        expected = model.generate(ids, attention_mask=mask, use_cache=False, **run)
        got = model.generate(ids, attention_mask=mask, **run)
        assert bool((expected == got).all())

    def test_chunked_prefill(self, name: str, which: str) -> None:
        model = self.model(name, which)
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

    def test_static(self, name: str, which: str) -> None:
        model, expected = self.model(name, which), self.uncached(name, which)
        ids, mask = prompts()
        cache = StaticCache(config=model.config, max_cache_len=64)
        got = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, past_key_values=cache
        )
        assert first_difference_is_a_tie(model, expected, got, mask)

    def test_prompt_lookup(self, name: str, which: str) -> None:
        model = self.model(name, which)
        ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])
        mask = torch.ones_like(ids)
        expected = greedy_without_cache(model, ids, mask)
        got = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
            prompt_lookup_num_tokens=3,
        )  # fmt: skip
        assert first_difference_is_a_tie(model, expected, got, mask)

    def test_second_generate_on_a_returned_cache(self, name: str, which: str) -> None:
        model = self.model(name, which)
        ids, mask = prompts()
        ids, mask, expected = ids[:1], mask[:1], self.uncached(name, which)[:1]
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
