"""MLA on real architectures: exact where it promises, cached decode equal to uncached."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models

from reattend import convert, find_attention, load
from reattend.passes.rewrite.mla import ToMla
from reattend.weights import dense_config

FAST = ("llama", "qwen3")
NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"]
NAMES += [
    "gpt_oss",
    "falcon_alibi",
    "bitnet",
    "qwen3_next",
]  # sinks, ALiBi, a norm and a gate after the core
CASES = [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in NAMES]


def build(name: str) -> Any:
    spelling = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    return zoo_models.build(name, spelling)


def data() -> torch.Tensor:
    return torch.randint(3, 97, (8, 40), generator=torch.Generator().manual_seed(3))


def exact_plan(model: Any) -> dict[str, Any]:
    site = find_attention(model).sites[0]
    options = ToMla().exact_setting(dense_config(site.spec, site.hidden_size, 0))
    return {"rules": [{"sites": "*", "to": "mla", **options.model_dump(exclude_none=True)}]}


@pytest.mark.parametrize("name", CASES)
def test_exact_setting_equals_the_original(name: str) -> None:
    model = build(name)
    result = convert(model, plan=exact_plan(model), data=data())
    assert {s.exactness for s in result.report.sites} == {"exact"}
    ids, mask = data()[:3, :29], torch.ones(3, 29).long()
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        got = result.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert (got - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    run = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert bool((model.generate(ids, **run) == result.model.generate(ids, **run)).all())


@pytest.mark.parametrize("name", CASES)
def test_reduced_cache_decodes_what_it_prefills(name: str, tmp_path: Path) -> None:
    """`decode_checks` runs inside convert; here the published folder must do the same again."""
    model = build(name)
    out = tmp_path / "out"
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]}
    result = convert(model, plan=plan, data=data(), out=out)
    assert [p.verdict for p in result.report.parity] == ["pass", "pass"]
    assert result.report.totals.cache_ratio == pytest.approx(0.5, abs=0.02)
    loaded = load(out)
    ids = data()[:2, :17]
    run = {"max_new_tokens": 20, "do_sample": False}
    assert bool((loaded.generate(ids, **run) == result.model.generate(ids, **run)).all())


@pytest.mark.slow
def test_shipped_model_generates_256_tokens_alike(
    shipped: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cached greedy decoding equals uncached, batch 1 and 3 left-padded, 256 tokens."""
    rows = torch.randint(10, 4000, (8, 128), generator=torch.Generator().manual_seed(1))
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_keep": 0.5}]}
    model = convert(shipped, plan=plan, data=rows).model
    for batch, pads in ((1, (0,)), (3, (0, 4, 9))):
        ids = torch.randint(10, 4000, (batch, 12), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        for row, pad in enumerate(pads):
            mask[row, :pad] = 0
        run = {
            "attention_mask": mask, "max_new_tokens": 256, "min_new_tokens": 256,
            "do_sample": False, "pad_token_id": 0,
        }  # fmt: skip
        cached = model.generate(ids, **run)
        floor, beyond, ties = _first_differences(model, cached, mask)
        with capsys.disabled():
            told = "; ".join((*ties, *beyond)) or "no difference in 256 tokens"
            sys.stderr.write(f"\nbatch {batch}, floor {floor:.1e}: {told}\n")
        assert 0 < floor < 1e-3  # float32 against float64: rounding, and nothing but rounding
        assert beyond == []


def _uncached(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What one pass says about every new token, [B, N, V]."""
    start = mask.shape[1]
    full = torch.cat([mask, torch.ones(len(tokens), tokens.shape[1] - start).long()], 1)
    position = (full.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=tokens, attention_mask=full, position_ids=position, use_cache=False
        ).logits[:, start - 1 : -1]
    return logits


def _first_differences(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[float, list[str], list[str]]:
    """Where uncached decoding first leaves each row: floor, differences beyond a tie, ties.

    Up to its first difference, uncached greedy decoding reads the very tokens that cached decoding
    wrote, so one pass over these shows it. The floor is what rounding alone does to these logits:
    the largest gap between the pass in the model's dtype and the same pass in float64. A
    difference is a tie if the two tokens' logits are within ten times the floor.
    """
    logits = _uncached(model, tokens, mask).double()
    wide = _uncached(copy.deepcopy(model).double(), tokens, mask)
    floor = float((logits - wide).abs().max())
    new = tokens[:, mask.shape[1] :]
    logits[..., 0] = float("-inf")  # min_new_tokens forbids the end token
    gap_BN = logits.max(-1).values - logits.gather(-1, new[..., None])[..., 0]
    beyond, ties = [], []
    for row, gap_N in enumerate(gap_BN):
        for place in gap_N.nonzero().flatten().tolist()[:1]:
            text = f"row {row} token {place}: uncached prefers another by {gap_N[place]:.2e}"
            (ties if float(gap_N[place]) <= 10 * floor else beyond).append(text)
    return floor, beyond, ties


def test_a_difference_beyond_a_tie_is_seen(shipped: Any) -> None:
    """The check above must be able to fail: one token that is not the best one."""
    ids = torch.randint(10, 4000, (1, 12), generator=torch.Generator().manual_seed(2))
    run = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    tokens = shipped.generate(ids, **run)
    assert _first_differences(shipped, tokens, torch.ones_like(ids))[1:] == ([], [])
    second = _uncached(shipped, tokens, torch.ones_like(ids))[0, 7].topk(2).indices[1]
    tokens[0, 12 + 7] = second
    floor, beyond, _ = _first_differences(shipped, tokens, torch.ones_like(ids))
    assert len(beyond) == 1
    assert beyond[0].startswith("row 0 token 7: ")
    assert floor < 1e-3
