"""Random patterns in random models: generation equals the original under a dense mask.

The reference is the original model with a mask for every head, written from the pattern's meaning.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from decoder_models import decoder
from torch import Tensor

from reattend import convert
from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern

PROMPT, NEW, HEADS = 14, 22, 4


def drawn(rng: random.Random) -> dict[str, Any]:
    """A pattern of one to three terms, none longer than a third of the text."""
    terms: dict[str, Any] = {
        "sinks": rng.randint(1, 4),
        "window": rng.randint(1, 9),
        "stride": {"period": rng.randint(2, 4), "block": rng.randint(1, 4)},
        "powers": {"block": rng.randint(1, 3)},
        "columns": sorted(rng.sample(range(12), 2)),
        "slashes": sorted(rng.sample(range(10), 2)),
    }
    found = {name: terms[name] for name in rng.sample(sorted(terms), rng.randint(1, 3))}
    if "window" in found and rng.random() < 0.3:
        found["window_slope"] = rng.choice([0.1, 0.25])
    return found


def masks(patterns: list[HeadPattern], real_BN: Tensor, window: int) -> Tensor:
    """What each query head sees [B, H, N, N]; additive."""
    place = (real_BN.cumsum(-1) - 1).masked_fill(real_BN == 0, -1)
    core = CoreConfig(
        heads=HEADS, kv_heads=len(patterns), qk_head_dim=8, v_head_dim=8, scale=1.0,
        pattern="sliding" if window else "causal", window=window,
    )  # fmt: skip
    seen = torch.stack([p.sees(place[:, :, None], place[:, None], core) for p in patterns], 1)
    seen = seen | torch.eye(place.shape[1], dtype=torch.bool)  # padding stays finite
    seen = seen.repeat_interleave(HEADS // len(patterns), 1)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_generation_equals_the_original_under_a_mask(seed: int) -> None:
    """MHA and GQA, a window of the block's own or none, left padding, one shot or chunks."""
    rng = random.Random(seed)
    name, groups = rng.choice(["llama", "mistral"]), rng.choice([1, 2, 4])
    original = decoder(name, layers=2, groups=groups)
    given = [drawn(rng) for _ in range(groups)]
    patterns = [HeadPattern.model_validate(p) for p in given]
    others = [{"kv_heads": [h], "pattern": p} for h, p in enumerate(given) if h]
    rule = {"sites": "*", "to": "sparse", "pattern": given[0], "head_patterns": others}
    model = convert(original, plan={"rules": [rule]}).model

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (3, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        pad = rng.choice([0, 0, 1, 5, 11])
        mask[row, :pad], ids[row, :pad] = 0, 0
    chunk = rng.choice([None, 3, 5])
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    got = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **more)

    real = torch.cat([mask, torch.ones(3, NEW, dtype=mask.dtype)], 1)
    position = (real.cumsum(-1) - 1).clamp_min(0)
    hidden = masks(patterns, real, 8 if name == "mistral" else 0)
    with torch.no_grad():
        want = original(got, attention_mask=hidden, position_ids=position, use_cache=False).logits
        plain = original(got, attention_mask=real, position_ids=position, use_cache=False).logits
    scores = want[:, PROMPT - 1 : -1]
    told = scores.gather(2, got[:, PROMPT:, None])[..., 0]
    assert float((scores.amax(-1) - told).max()) <= 1e-4  # the best token, up to ties
    assert float((plain - want)[real.bool()].abs().max()) > 1e-2
