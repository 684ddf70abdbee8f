"""Heads that look at what the model copies, and heads that look far, are told from the others."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import HIDDEN, config, dense
from torch import Tensor

from reattend import convert
from reattend.errors import PlanError
from reattend.mixers.base import Context
from reattend.passes.rewrite.base import Answered, Subject
from reattend.passes.rewrite.repeats import sources
from reattend.passes.rewrite.sparse_instant import area, averaged, distant
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.passes.rewrite.sparse_retrieval import retrieval
from reattend.passes.rewrite.sparse_watch import Look
from reattend.patterns.pattern import HeadPattern

N, NEAR = 128, 2  # near: a sixty-fourth of a row


class Copying:
    """A model of one block whose KV head 1 looks, by one of its two query heads, near the source,
    and whose KV head 0 does so too far from it."""

    length = N

    def __init__(self, told: Tensor) -> None:
        self.told = told

    @contextmanager
    def answers(self, mixers: dict[str, Any], length: int, rows: int) -> Any:
        """Queries and keys are unit vectors: a key is found by the number it is written as."""
        keys = 9.0 * torch.eye(N)[None, None].expand(1, 2, N, N)
        own, following = torch.eye(N), torch.arange(N)
        following[N // 2 - 1 : -1] = sources(N)
        near, far = (own[(following + NEAR + more).clamp(max=N - 1)] for more in (0, 1))
        q = torch.stack([far, own, own, near])[None]
        core = config().core.model_copy(update={"qk_head_dim": N, "v_head_dim": N})
        mixers["a"].watch(Look(q, keys, keys, None, None, core), q)
        ids, place = torch.cat([torch.arange(N // 2), sources(N)]), torch.arange(N // 2, N - 1)
        yield iter([Answered(ids, place, torch.zeros(len(place), 4), self.told)])


def test_the_head_that_looks_at_the_source_is_found() -> None:
    sites: list[Any] = [Subject("a", dense(config()), None, None)]
    ids = sources(N)[1:]
    assert retrieval(sites, Copying(ids))["a"].tolist() == [0.0, 1.0]  # type: ignore[arg-type]
    wrong: Any = Copying(ids + 1)
    with pytest.raises(PlanError, match="a model that copies"):
        retrieval(sites, wrong)


def test_the_area_tells_far_from_near() -> None:
    """A head without its rotation looks everywhere alike: 1/2; one with q = k looks near."""
    block = dense(config())
    mixer = averaged(block)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    assert torch.equal(mixer(x, Context()), block(x, Context()))
    assert mixer.tokens == 18
    rows = block.k_proj(x).unflatten(-1, (2, -1)).sum((0, 1))
    assert (mixer.sums[1] - rows).abs().max() <= 1e-12
    near = torch.zeros_like(mixer.sums[1])
    near[1] = 60.0
    mixer.sums = (near.repeat_interleave(2, 0), near)
    far, close = area(mixer, 64).tolist()
    assert far == pytest.approx(0.5, abs=0.01) and close < 0.05


def test_distant_mass_is_what_the_pattern_hides() -> None:
    core = config().core
    q = torch.zeros(1, 4, N, 8)
    look = Look(q, q[:, :2], q[:, :2], None, None, core)
    pattern = HeadPattern(sinks=1, window=4)
    expected = sum(max(0, i - 4) / (i + 1) for i in range(N)) / N
    assert float(distant(look, 0, pattern)) == pytest.approx(expected)


@pytest.mark.parametrize("finder", ["retrieval", "instant", "profile"])
def test_a_model_is_converted_by_each(finder: str) -> None:
    """End to end, and the original stays as it was."""
    rule: dict[str, Any] = {"sites": "*", "to": "sparse", "finder": finder}
    if finder == "profile":
        pytest.importorskip("scipy")
        rule |= {"kv_density": 0.5, "profile": {"sinks": 1, "samples": 2, "lengths": [64, 128]}}
    else:
        rule |= {"pattern": {"sinks": 1, "window": 8}, "keep_full": 0.5}
    plan = {"rules": [rule], "calibrate": {"seq_len": 192, "statistics_tokens": 768}}
    original = decoder("llama", layers=2, groups=2)
    before = {name: p.clone() for name, p in original.named_parameters()}
    data = torch.randint(3, 97, (8, 192), generator=torch.Generator().manual_seed(0))
    result = convert(original, plan=plan, data=data)
    classes = [layer.self_attn.mixer.config.classes for layer in result.model.model.layers]
    if finder == "profile":
        gap = float(result.report.sites[0].options["chosen"].rpartition("at most ")[2].rstrip("%"))
        assert gap <= 1.0
        core = config().core
        held = [len(c.kv_heads) * c.pattern.reads(192, core) / 192 for one in classes for c in one]
        assert sum(held) / 4 <= 0.5
        assert (
            result.report.sites[0].options["chosen"].startswith("profiled at 64, 128, 192 tokens; ")
        )
    else:
        assert sum(len(c.kv_heads) for one in classes for c in one if c.pattern.full) == 2
    assert all(torch.equal(before[n], p) for n, p in original.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in original.parameters())
    refused = {**rule, "keep_full": None, "kv_density": None}
    with pytest.raises(ValueError, match="chooses by"):
        SparseOptions.model_validate({k: v for k, v in refused.items() if k not in ("sites", "to")})
