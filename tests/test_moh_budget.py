"""`top_k: auto`: one budget of heads for all layers, spent where the model's output needs it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import config, dense, moments
from moh_blocks import wide
from pydantic import ValidationError

from reattend import convert
from reattend.errors import PlanError
from reattend.passes.rewrite.base import Subject
from reattend.passes.rewrite.moh import ToMoh
from reattend.passes.rewrite.moh_budget import tried
from reattend.passes.rewrite.moh_options import Heads, MohOptions

AUTO: dict[str, Any] = {"top_k": "auto", "route": "head", "select_shared": "first"}


def sites(shared: tuple[int, ...], active: float) -> list[Subject]:
    """Blocks of 8 heads in 4 groups, one for each count of shared heads."""
    block = dense(wide(config()))
    return [
        Subject(str(n), block, moments(block), MohOptions(**AUTO, shared=s, active=active))
        for n, s in enumerate(shared)
    ]


@pytest.mark.parametrize("active", [0.5, 0.8, 1.0])
def test_counts_lose_least_of_all_that_fit(active: float) -> None:
    """Against every combination; layers with shared heads have the same budget."""
    found, weights = sites((0, 4, 2), active), {"0": 1.0, "1": 5.0, "2": 0.3}
    made, asked = ToMoh(), []

    def lost(path: str, routed: int, k: int) -> float:
        return weights[path] * (routed - k) ** 2

    def measure(path: str, mixer: Any) -> float:
        asked.append(path)
        return lost(path, mixer.config.routed, mixer.router.k)

    counts = [o.top_k for o in made.allocate(found, measure)]  # type: ignore[arg-type]
    routed = {s.path: 8 - int(s.options.shared) for s in found}
    each = [[(p, k) for k in range(1, n + 1)] for p, n in routed.items()]
    fits = (
        ks for ks in product(*each)
        if sum(k + 8 - routed[p] for p, k in ks) <= active * 24
    )  # fmt: skip
    best = min(fits, key=lambda ks: sum(lost(p, routed[p], k) for p, k in ks))
    assert counts == [k for _, k in best]
    assert len(asked) == made.trials([s.dense.config for s in found[:1]], found[0].options) + 3 + 5
    assert len({made.together(s.options) for s in found}) == 1


def test_many_heads_are_not_all_tried() -> None:
    assert tried(Heads(32, 0, 32)) == [1, 4, 8, 12, 16, 20, 24, 28]
    assert tried(Heads(4, 2, 2)) == [1]


def test_the_least_share_that_is_accepted_can_be_spread() -> None:
    block = dense(config(32, 8))
    options = MohOptions(**AUTO, shared=8, active=9 / 32)
    assert ToMoh().check(block.config, options) is None
    found = [Subject("0", block, moments(block), options)]

    def measure(path: str, mixer: Any) -> float:
        return float(mixer.config.routed - mixer.router.k)

    assert [o.top_k for o in ToMoh().allocate(found, measure)] == [1]


def test_what_cannot_be_spread_is_refused() -> None:
    cfg = wide(config())
    refusal = ToMoh().check(cfg, MohOptions(**AUTO, shared=4, active=0.5))
    assert refusal is not None and "4 are shared" in refusal.reason
    for half in ({"top_k": "auto"}, {"active": 0.5}):
        with pytest.raises(ValidationError, match="go together"):
            MohOptions(**half)
    with pytest.raises(PlanError, match="one of its blocks replaced"):
        ToMoh().allocate(sites((0, 0), 0.5), lambda *_: None)  # type: ignore[arg-type]


def test_a_layer_that_adds_nothing_leaves_the_others_whole() -> None:
    model: Any = decoder("llama", layers=2, groups=4)
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    rule = {"sites": "*", "to": "moh", "shared": 0, "active": 0.75, **AUTO}
    result = convert(model, plan={"rules": [rule]}, data=torch.randint(3, 97, (8, 20)))
    assert [s.options["top_k"] for s in result.report.sites] == ["1 of 4", "4 of 4"]
    assert [s.exactness for s in result.report.sites] == ["learned", "exact"]
