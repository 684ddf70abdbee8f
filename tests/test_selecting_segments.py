"""Chunks of predicted ends (DHSA): exact, a naive mask, what is taught, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder, prompts
from mla_blocks import CASES, config, dense
from pydantic import ValidationError
from test_selecting import BOTH_WAYS, gap, inputs, scores
from test_selecting_gate import statistics
from torch import Tensor
from transformers import DynamicCache

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.mixers.scores import own_pattern
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_boundaries import lesson as lesson_of
from reattend.passes.rewrite.sparse_options import SparseOptions

SMALL: dict[str, Any] = {
    "kind": "segments", "window": 2, "apart": 2, "theta": 1.0, "longest": 12, "local": 3,
    "hidden": 5,
}  # fmt: skip


def options(steps: int = 30, **select: Any) -> SparseOptions:
    return SparseOptions.model_validate(
        {"pattern": {"select": SMALL | select}, "finder": "gate", "steps": steps}
    )


def untrained(block: DenseAttention, **select: Any) -> Any:
    """With weights at random."""
    mixer = ToSparse().build(block, None, options(**select)).mixer
    for p in mixer.selecting.parameters():
        p.data = torch.randn_like(p)
    return mixer


@pytest.mark.parametrize("budget", [{"topk": 99}, {"ratio": 1.0}])
@pytest.mark.parametrize("name", ["gqa", "softcap", "window", "sinks"])
def test_a_budget_that_covers_everything_is_the_original(name: str, budget: Any) -> None:
    block = dense(CASES[name])
    mixer = untrained(block, **budget)
    for n in (3, 40):
        x, real = inputs(n, (0, 2))
        with torch.no_grad():
            assert gap(mixer(x, Context(mask=real)), block(x, Context(mask=real)), real) < 1e-12


def logit(method: Any, g: int, k: Tensor, t: int) -> float:
    """Of the gap behind token t, by the paper's formulas."""
    w = {name: p[g] for name, p in method.named_parameters()}

    def code(keys: Tensor) -> Tensor:
        mixed = ((keys.T * w["mixed_Gdu"]).sum(-1) + w["mixed_Gd"]).relu()
        return (mixed @ w["code_Gdw"] + w["code_Gw"]).relu()

    left, right = code(k[t - 1 : t + 1]), code(k[t + 1 : t + 3])
    lengths = (left.norm() * right.norm()).clamp_min(1e-12)
    all_of_them = [left, right, (left - right).abs(), left * right, (left @ right / lengths)[None]]
    return float(
        (torch.cat(all_of_them) @ w["fused_Gfw"] + w["fused_Gw"]).relu() @ w["ends_Gw"]
        + w["ends_G"]
    )


def chosen(block: DenseAttention, mixer: Any, x: Tensor, budget: int) -> Tensor:
    """Every query cuts what it knows of the text, ranks the chunks, and counts tokens."""
    q, k, _ = scores(block, x)
    n, core = len(x), block.config.core
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    for h in range(4):
        g = h // 2
        found = {t: logit(mixer.selecting["0"], g, k[h], t) for t in range(1, n - 2)}
        for i in range(n):
            known = [t for t in found if t + 4 <= i]
            near = {t: [found[s] for s in found if s != t and abs(s - t) <= 2] for t in known}
            ends = {t for t in known if found[t] > 0 and found[t] > max(near[t])}
            ends |= {t for t in range(11, n, 12) if t + 4 <= i}
            mine = [j for j in range(i + 1) if bool(own_pattern(core, Tensor([i]), Tensor([j])))]
            last = max(ends, default=-1)
            sure = [j for j in mine if j > last or i - j < 3]
            chunks, begin = [], 0
            for end in sorted(ends):
                mean = k[h, begin : end + 1].mean(0) * (end + 1 - begin) ** 0.5
                chunks.append((float(q[h, i] @ mean), range(begin, end + 1)))
                begin = end + 1
            order = [
                j for _, chunk in sorted(chunks, key=lambda c: -c[0]) for j in reversed(chunk)
                if j in mine and j not in sure
            ]  # fmt: skip
            seen[h, i, sure + order[: max(0, budget - len(sure))]] = True
    return seen


@pytest.mark.parametrize("name", ["gqa", "window"])
def test_what_is_chosen_equals_a_naive_mask(name: str) -> None:
    block = dense(CASES[name] if name == "gqa" else config(window=20))
    mixer = untrained(block, topk=14)
    x, real = inputs(46, (0, 7))
    mask = torch.eye(46, dtype=torch.bool).expand(2, 4, 46, 46).clone()
    with torch.no_grad():
        for row, pad in enumerate((0, 7)):
            mask[row, :, pad:, pad:] = chosen(block, mixer, x[row, pad:], 14)
        at = (real.cumsum(-1) - 1).clamp_min(0)
        got = mixer(x, Context(mask=real, position_BN=at))
        assert gap(got, block(x, Context(mask=mask)), real) < 1e-12
    assert len({tuple(r.tolist()) for r in mask[0, :, 45].int()}) > 3  # heads differ


def test_what_is_taught_is_the_attention_of_later_queries() -> None:
    block = dense(CASES["sinks"])
    mixer = ToSparse().build(block, None, options(topk=9)).mixer
    x = inputs(19, (0,))[0][0]
    lesson = lesson_of(mixer, x, (0, 1), mixer.selecting["0"])
    assert lesson is not None and lesson_of(mixer, x[:8], (0, 1), mixer.selecting["0"]) is None
    with torch.no_grad():
        s = scores(block, x)[2].masked_fill(~torch.ones(19, 19).tril().bool(), float("-inf")).exp()
        assert block.sinks is not None
        p = (s / (s.sum(-1, keepdim=True) + block.sinks.exp().view(4, 1, 1))).unflatten(0, (2, 2))
    p = p.mean(1)
    for number, t in enumerate(range(3, 15)):
        past, future = (p[:, t + 2 :, a : a + 2].sum((1, 2)) for a in (t - 1, t + 1))
        ratio = torch.maximum(past, future) / torch.minimum(past, future)
        expected = (4 * ratio.log()).sigmoid()
        assert (lesson.target_GT[:, number] - expected).abs().max() < 1e-4  # small numbers added
    assert lesson.target_GT.shape == (2, 12)


def test_training_brings_the_ends_nearer() -> None:
    block = dense(config())
    asked = options(topk=9, steps=120)
    built = ToSparse().build(block, statistics(block), asked)
    before, _, after = built.evidence["segments_bce"].split()[:3]
    assert float(after) < 0.9 * float(before)
    counted = sum(p.numel() for p in built.mixer.parameters())
    assert counted == ToSparse().cost(block.config, asked).parameters


def test_decoding_equals_one_pass(tmp_path: Any) -> None:
    """Prefill in pieces, padding on the left; from a folder; what the report says."""
    rule = {"sites": "*", "to": "sparse", "pattern": {"select": SMALL | {"topk": 8}},
            "finder": "gate", "steps": 4}  # fmt: skip
    plan = {"rules": [rule], "calibrate": {"seq_len": 24}}
    result = convert(
        decoder("llama", layers=2, groups=2), plan=plan, data=torch.randint(3, 97, (8, 24)),
        out=tmp_path / "s",
    )  # fmt: skip
    model = load(tmp_path / "s")
    ids, mask = prompts()
    run = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **run)
    assert bool((model.generate(ids, **run) == expected).all())
    full = torch.cat([mask, torch.ones(3, 24).long()], 1)
    place = (full.cumsum(-1) - 1).clamp_min(0)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(expected, attention_mask=full, position_ids=place, use_cache=False).logits
        for start, end in ((0, 5), (5, 6), (6, 20), (20, 37)):
            out = model(
                expected[:, start:end], attention_mask=full[:, :end],
                position_ids=place[:, start:end], past_key_values=cache,
            )  # fmt: skip
            parts.append(out.logits)
    real = full.bool()
    assert (torch.cat(parts, 1) - whole)[real].abs().max() <= 2e-5 * whole[real].abs().max()
    said = result.report.sites[0].options
    assert said["select"] == "segments (both)" and said["kv_density"] == "1.062"  # 17 of 16
    assert said["attention_density"].startswith("0.004 in prefill, 0.004")  # 16 of 4096
    assert [p.verdict for p in result.report.parity] == ["pass", "pass"]


def test_what_cannot_be_is_refused() -> None:
    refusal = ToSparse().check(BOTH_WAYS, options(topk=4))
    assert refusal is not None and "needs a causal block" in refusal.reason
    with pytest.raises(ValidationError, match="topk or ratio"):
        options(topp=0.5)
    with pytest.raises(ValidationError, match="go together"):
        SparseOptions.model_validate({"pattern": {"select": SMALL | {"topk": 4}}})
