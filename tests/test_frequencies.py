"""Frequencies of rotation are the stored ones, not those fitted to tables of few bits."""

from __future__ import annotations

import pytest
import torch
import zoo_models

from reattend import find_attention
from reattend.spec import Rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_the_models_own(dtype: torch.dtype) -> None:
    model = zoo_models.build("llama").to(dtype)
    stored = tuple(float(f) for f in model.model.rotary_emb.inv_freq)
    sites = find_attention(model).sites
    assert len(sites) == 2
    for site in sites:
        for stream in (site.spec.q, site.spec.k):
            (turn,) = (s for s in stream.steps if isinstance(s, Rotary))
            assert turn.inv_freq == stored
