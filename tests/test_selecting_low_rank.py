"""A trained guess of an image's attention (Sparsifiner): exact, a naive mask, what is taught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, config, dense
from test_selecting import BOTH_WAYS, scores
from test_selecting_gate import statistics
from zoo_models import build

from reattend import convert
from reattend.errors import ArgumentError, RefusedError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.base import dense_cost
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_guess import lesson as lesson_of
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.plan import Plan

WHERE: dict[str, Any] = {"image_grid": (4, 5), "text_before": 1, "text_after": 2}


def options(steps: int = 30, **select: Any) -> SparseOptions:
    given = {"kind": "low-rank", "reduce_tokens": 4, **select}
    return SparseOptions.model_validate(
        {"pattern": {"select": given}, "finder": "gate", "steps": steps, **WHERE}
    )


def untrained(block: DenseAttention, **select: Any) -> Any:
    """With weights at random."""
    mixer = ToSparse().build(block, None, options(**select)).mixer
    for p in mixer.selecting.parameters():
        p.data = torch.randn_like(p)
    return mixer


def test_a_budget_that_covers_everything_is_the_original() -> None:
    block = dense(BOTH_WAYS)
    mixer = untrained(block, ratio=1.0)
    x = torch.randn(2, 23, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        assert (mixer(x, Context()) - block(x, Context())).abs().max() < 1e-12
        with pytest.raises(ArgumentError, match="grid of 23 tokens was given 22"):
            mixer(x[:, :22], Context())


def test_what_is_chosen_equals_a_naive_mask() -> None:
    """The paper's formulas, head by head."""
    block = dense(BOTH_WAYS)
    mixer = untrained(block, topk=6)
    x = torch.randn(2, 23, HIDDEN, dtype=torch.float64)
    mask = torch.eye(23, dtype=torch.bool).expand(2, 4, 23, 23).clone()
    w = dict(mixer.selecting["0"].named_parameters())
    assert w["down_GMr"].shape == (2, 23, 5) and w["query_Gdc"].shape == (2, 8, 4)
    with torch.no_grad():
        for row in range(2):
            q, k, _ = scores(block, x[row])
            for h in range(4):
                g = h // 2
                narrow = q[h] @ w["query_Gdc"][g] + w["query_Gc"][g]
                columns = (k[h] @ w["key_Gdc"][g] + w["key_Gc"][g]).T @ w["down_GMr"][g]
                guess = (narrow @ columns / 2).softmax(-1) @ w["up_GrM"][g]
                mask[row, h].scatter_(1, guess.topk(6).indices, True)
            mask[row, :, [0, 21, 22]] = True  # text
        expected = block(x, Context(mask=mask))
        assert (mixer(x, Context()) - expected).abs().max() < 1e-12


def test_what_is_taught_is_the_attention_of_the_image() -> None:
    block = dense(BOTH_WAYS)
    mixer = ToSparse().build(block, None, options(topk=6)).mixer
    x = torch.randn(23, HIDDEN, dtype=torch.float64)
    method = mixer.selecting["0"]
    lesson = lesson_of(mixer, x, (0, 1), method)
    with pytest.raises(ArgumentError, match="grid of 23 tokens was given 9"):
        lesson_of(mixer, x[:9], (0, 1), method)
    with torch.no_grad():
        q, k, s = scores(block, x)
        guess = method.guess(q[None], k[None, ::2])[0]
        expected = (guess - s.softmax(-1))[:, 1:21].square().sum(-1).mean()
        assert (lesson.loss(method) - expected).abs() < 1e-12
        assert (guess.sum(-1) - 1).abs().max() < 1e-6  # at its start: shares of neighbours


def test_training_brings_the_guess_nearer() -> None:
    """On images that have something in common: where their tokens are."""
    block = dense(BOTH_WAYS)
    asked = options(topk=6, steps=150)
    built = ToSparse().build(block, statistics(block, rows=24, tokens=23, common=1.0), asked)
    before, _, after = built.evidence["low_rank_error"].split()[:3]
    assert float(after) < 0.98 * float(before)
    counted = sum(p.numel() for p in built.mixer.parameters())
    assert counted == ToSparse().cost(BOTH_WAYS, asked).parameters


def test_an_image_model_is_converted() -> None:
    """A class token and 4 x 4 patches; the preset at the size of the model."""
    plan = Plan.load("sparsifiner").rules[0]
    rule = {"sites": "*", "to": "sparse", **plan.options.model_dump(exclude_unset=True)}
    rule |= {"image_grid": [4, 4], "text_before": 1, "steps": 5}
    torch.manual_seed(1)
    images = [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(4)]
    model = build("vit")
    result = convert(model, plan={"rules": [rule]}, data=images, inputs=images[0])
    with torch.no_grad():
        got, expected = (m(**images[0]).logits for m in (result.model, model))
    assert (got - expected).abs().max() > 1e-4 and bool(got.isfinite().all())
    said = result.report.sites[0].options
    assert said["select"] == "low-rank (both)" and "low_rank_error" in said
    assert said["attention_density"] == "0.353, at most"  # 5 of 17, and the class token
    rule["image_grid"] = [3, 4]
    with pytest.raises(RefusedError, match=r"1 \+ 3 x 4 tokens does not fit: the block reads 17"):
        convert(model, plan={"rules": [rule]}, data=images, inputs=images[0])


def test_what_cannot_be_is_refused() -> None:
    made, preset = ToSparse(), Plan.load("sparsifiner").rules[0].options
    for cfg, where, words in (
        (config(), {"image_grid": (14, 14)}, "not causal"),
        (BOTH_WAYS, {}, "give image_grid"),
        (BOTH_WAYS, {"image_grid": (40, 40)}, "has 1600"),
    ):
        given = {**preset.model_dump(exclude_unset=True), **where}
        refusal = made.check(cfg, SparseOptions.model_validate(given))
        assert refusal is not None and words in refusal.reason
    fits = {**preset.model_dump(exclude_unset=True), "image_grid": (14, 14), "text_before": 1}
    options = SparseOptions.model_validate(fits)
    assert made.check(BOTH_WAYS, options) is None
    assert made.cost(BOTH_WAYS, options).parameters > dense_cost(BOTH_WAYS).parameters
