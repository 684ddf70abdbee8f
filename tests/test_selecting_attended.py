"""Blocks by attended keys (LongHeads): a reference from the paper, caches that recall queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache_matrix import CacheMatrix
from decoder_models import decoder
from mla_blocks import CASES, config, dense
from pydantic import ValidationError
from test_selecting import BOTH_WAYS, LONG, converted, gap, inputs
from torch import Tensor
from transformers import DynamicCache

from reattend import convert
from reattend.errors import UnsupportedCacheError
from reattend.mixers.base import Context
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.sparse import ToSparse
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.patterns.pattern import HeadPattern


def longheads(block: int, topk: int) -> dict[str, Any]:
    """The published rule: the first chunk, the last two, and the best."""
    return {
        "kind": "blocks", "key": "attended", "block": block, "topk": topk, "first": 1, "last": 2
    }  # fmt: skip


def turn(x_Nd: Tensor, place: list[int]) -> Tensor:
    """The test block's rotation: four pairs at 3^-i radians per token, real parts first."""
    angle = torch.tensor(place)[:, None] * 3.0 ** -torch.arange(4, dtype=torch.float64)
    turned = torch.view_as_complex(x_Nd.view(-1, 2, 4).transpose(1, 2).contiguous())
    turned = turned * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).transpose(1, 2).flatten(1)


def chosen(block: DenseAttention, x: Tensor, size: int, topk: int) -> Tensor:
    """LongHeads, head by head and chunk by chunk; [H, N, N]."""
    n = len(x)
    q = block.q_proj(x).view(n, 4, 8)
    k, v = (p(x).view(n, 2, 8).repeat_interleave(2, 1) for p in (block.k_proj, block.v_proj))
    seen = torch.zeros(4, n, n, dtype=torch.bool)
    for h in range(4):
        keys = {}
        for c in range(n // size):
            mine = slice(c * size, (c + 1) * size)
            local = list(range(size))  # positions inside the chunk
            lq, lk = turn(q[mine, h], local), turn(k[mine, h], local)
            mean = ((0.3 * lq @ lk.T).softmax(-1) @ v[mine, h]).mean(0)
            keys[c] = (0.3 * lk @ mean).softmax(-1) @ lk
        for i in range(n):
            own = i // size
            sure = {0, own, max(own - 1, 0)}
            rest = sorted(set(range(own)) - sure, key=lambda c: -float(q[i, h] @ keys[c]))
            for c in (*sure, *rest[: topk - len(sure)]):
                seen[h, i, c * size : min((c + 1) * size, i + 1)] = True
    return seen


@pytest.mark.parametrize("name", ["gqa", "mha", "softcap", "window", "sinks", "no-rotary"])
def test_a_budget_that_covers_everything_is_the_original(name: str) -> None:
    block = dense(CASES[name])
    mixer = converted(block, select=longheads(7, 99))
    x, real = inputs(40)
    with torch.no_grad():
        assert gap(mixer(x, Context(mask=real)), block(x, Context(mask=real)), real) < 1e-12


@pytest.mark.parametrize(("size", "n"), [(5, 40), (16, LONG)])
def test_what_is_chosen_equals_a_naive_mask(size: int, n: int) -> None:
    block = dense(config())
    mixer = converted(block, select=longheads(size, 4))
    x, real = inputs(n, (0, 7))
    mask = torch.eye(n, dtype=torch.bool).expand(2, 4, n, n).clone()
    with torch.no_grad():
        for row, pad in enumerate((0, 7)):
            mask[row, :, pad:, pad:] = chosen(block, x[row, pad:], size, 4)
        at = (real.cumsum(-1) - 1).clamp_min(0)
        got = mixer(x, Context(mask=real, position_BN=at))
        assert gap(got, block(x, Context(mask=mask)), real) < 1e-12


_MADE: dict[str, Any] = {}


def made() -> Any:
    if "model" not in _MADE:
        rule = {"sites": "*", "to": "sparse", "pattern": {"select": longheads(3, 4)}}
        _MADE["model"] = convert(decoder("llama", layers=3, groups=2), plan={"rules": [rule]})
    return _MADE["model"]


@pytest.mark.parametrize(("name", "which"), [("llama", "all")])
class TestMatrix(CacheMatrix):
    def model(self, name: str, which: str) -> Any:
        return made().model

    def test_static(self, name: str, which: str) -> None:
        """Tested with routing by mean keys: the layer is of the same class."""


def test_a_cache_recalls_the_queries_of_the_last_tokens() -> None:
    """And refuses to make up what it forgot."""
    model, report = made().model, made().report
    ids = torch.randint(3, 97, (1, 90))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[:, -1]
        model(ids[:, :89], past_key_values=cache)
        layer = cache.layers[1]
        held = [t.numel() for t in layer.rows]
        # 29 chunks for 4 heads of 8 numbers, and 3 + 64 queries
        assert held[-2:] == [29 * 32, 67 * 32]
        cache.crop(-60)
        model(ids[:, 29:89], past_key_values=cache)
        got = model(ids[:, 89:], past_key_values=cache).logits[:, 0]
        assert (got - whole).abs().max() <= 2e-5 * whole.abs().max()
        cache.crop(-88)
        with pytest.raises(UnsupportedCacheError, match="more than 64 tokens"):
            model(ids[:, :1], past_key_values=cache)
    site = report.sites[0]
    assert site.options["attention_density"].startswith("0.003 in prefill, 0.003")  # 12 of 4096
    beside = 32 / 3 + 67 * 32 / 4096
    assert site.options["kv_density"] == f"{1 + beside / 32:.3f}"
    assert site.cost.after.cache_numbers_per_token == -(-(4096 * (32 + beside)) // 4096)
    assert [p.verdict for p in report.parity] == ["pass", "pass"]


def test_texts_shorter_than_a_chunk_are_decoded() -> None:
    """Token by token, from before there is a chunk that could stand for anything."""
    model, ids = made().model, torch.randint(3, 97, (2, 7))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        got = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(7)]
    assert (torch.cat(got, 1) - whole).abs().max() <= 2e-5 * whole.abs().max()


@pytest.mark.parametrize(
    ("cfg", "reason"), [(BOTH_WAYS, "needs a causal block"), (CASES["v-width"], "6 and 8")]
)
def test_what_cannot_be_is_refused(cfg: Any, reason: str) -> None:
    pattern = HeadPattern.model_validate({"select": longheads(4, 4)})
    refusal = ToSparse().check(cfg, SparseOptions(pattern=pattern))
    assert refusal is not None and reason in refusal.reason


@pytest.mark.parametrize("more", [{"topk": 2}, {"tile": (2, 2)}, {"queries": "pooled"}])
def test_descriptions_that_contradict_themselves_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="always chosen|not for tiles|single queries"):
        HeadPattern.model_validate({"select": longheads(4, 4) | more})
