"""Routed blocks leave computation out wherever the op can be told what queries see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mla_blocks import HIDDEN, config, dense
from moh_blocks import WAYS, routed, wide

from reattend.mixers.base import Context
from reattend.mixers.routed_spans import pays

CAUSAL = torch.ones(40, 40).tril().bool()
SECOND = torch.arange(40) > 20
MASKS: dict[str, tuple[int, Any]] = {
    "none": (40, None),
    "validity": (40, torch.arange(40)[None] >= torch.tensor([0, 5])[:, None]),
    "bool": (40, (CAUSAL & (torch.arange(40) >= 5))[None, None]),
    "additive": (40, torch.zeros(40, 40).masked_fill(~CAUSAL, -1e38)[None, None]),
    "window": (40, (CAUSAL & ~CAUSAL.tril(-7))[None, None]),
    "chunk": (9, CAUSAL[None, None, -9:]),
    "one-token": (1, (torch.arange(40) >= torch.tensor([3, 11])[:, None])[:, None, None]),
    "free-slots": (1, (torch.arange(40) < 31)[None, None, None]),
    "two-texts": (40, (CAUSAL & (SECOND[:, None] == SECOND))[None, None]),
    "per-head": (40, CAUSAL.expand(1, 8, 40, 40)),
    "bias": (40, torch.randn(40, 40).masked_fill(~CAUSAL, -1e38)[None, None]),
}  # fmt: skip
#: what two numbers per row cannot say
DENSE = ("two-texts", "per-head", "bias")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("way", ["kv-group", "head"])
def test_heads_that_are_left_out_are_not_computed(
    way: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op and the masked block are one function, under every mask that the op can be told."""
    n, given = MASKS[mask]
    block = dense(wide(config(window=7 if mask == "window" else 0)))
    mixer = routed(block, **WAYS[way])
    x = torch.randn(2, 40, HIDDEN, dtype=torch.float64)
    ctx = Context(mask=given.double() if mask in ("additive", "bias") else given)
    calls = []
    op = mixer.skipping
    monkeypatch.setattr("reattend.mixers.routed.pays", lambda *_: True)
    monkeypatch.setattr(mixer, "skipping", lambda *a: calls.append(op(*a)) or calls[-1])
    with torch.no_grad():
        query, _ = mixer.project(x[:, -n:], None, ctx, None)
        _, rows = mixer.project(x, x, ctx, None)
        got = mixer.attend(query, rows, ctx, None)
        monkeypatch.setattr(mixer, "skipping", lambda *_: None)
        want = mixer.attend(query, rows, ctx, None)
    assert (calls[0] is None) == (mask in DENSE)
    real = slice(5, None) if mask in ("validity", "bool") else slice(None)
    assert (got - want)[:, :, real].abs().max() <= 1e-12 * want[:, :, real].abs().max()


def test_it_pays_where_enough_is_left_out() -> None:
    block = dense(wide(config(width=64, v_width=64)))
    cpu = torch.device("cpu")
    half, most = ({"shared": 1, "top_k": k} for k in (1, 2))
    by_group, three = (routed(block, **o).config for o in (half, most))
    by_head = routed(block, shared=0, top_k=6, route="head").config
    assert pays(by_group, cpu, 512, 512) and pays(three, cpu, 512, 512)
    assert not pays(by_head, cpu, 512, 512)
    assert not pays(by_group, cpu, 64, 64)
    assert pays(by_group, cpu, 1, 4096) and not pays(by_group, cpu, 1, 512)
    assert not pays(by_head, cpu, 1, 1 << 20)
    assert pays(by_head, torch.device("cuda"), 1, 16)
