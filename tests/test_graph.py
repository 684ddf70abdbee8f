"""Hand-written modules: fused `c_attn` with an owner, and attention inlined in its block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend import convert, find_attention, load
from reattend.errors import ArgumentError

WIDTH, HEADS = 32, 4


class CausalSelfAttention(nn.Module):
    """nanoGPT's: one fused projection, SDPA with is_causal."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH)
        self.attn = CausalSelfAttention()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln(x))
        return x + F.gelu(self.mlp(x))


class InlinedBlock(nn.Module):
    """Everything in one forward: grouped heads, a rotary table, a mask buffer, eager softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH)
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.wv = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        angle = torch.outer(torch.arange(64).float(), 0.5 ** torch.arange(4).float())
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("tril", torch.ones(64, 64).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.ln(x)
        q = self.wq(h).view(b, t, HEADS, 8).transpose(1, 2)
        k = self.wk(h).view(b, t, 2, 8).transpose(1, 2)
        v = self.wv(h).view(b, t, 2, 8).transpose(1, 2)
        q, k = self.turn(q, t), self.turn(k, t)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.transpose(-2, -1)) / 8**0.5
        scores = scores.masked_fill(~self.tril[:t, :t], float("-inf"))
        y = F.softmax(scores, -1) @ v
        return x + self.wo(y.transpose(1, 2).reshape(b, t, WIDTH))

    def turn(self, x: Tensor, t: int) -> Tensor:
        cos, sin = self.cos[:t], self.sin[:t]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class Tower(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.position = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = self.through(block, x)
        return self.head(x)

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


class FlatTower(Tower):
    """Runs its blocks' code without calling them: no submodule holds any attention."""

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        return block.forward(x)


def tower(block: type[nn.Module]) -> Tower:
    torch.manual_seed(4)
    return (FlatTower if block is InlinedBlock else Tower)(block).eval()


INPUTS = {"ids": torch.arange(2 * 17).reshape(2, 17) % 50}


@pytest.mark.smoke
def test_fused_projection_keeps_its_owner() -> None:
    found = find_attention(tower(NanoBlock), INPUTS)
    assert [(s.path, s.owner) for s in found.sites] == [
        ("blocks.0.attn", "module"), ("blocks.1.attn", "module"),
    ]  # fmt: skip
    assert found.sites[0].spec.q.proj.weight == found.sites[0].spec.v.proj.weight


def test_a_called_block_owns_its_inlined_attention() -> None:
    torch.manual_seed(4)
    found = find_attention(Tower(InlinedBlock).eval(), INPUTS)
    assert [(s.path, s.owner) for s in found.sites] == [
        ("blocks.0", "module"), ("blocks.1", "module"),
    ]  # fmt: skip


def test_blocks_that_feed_each_other_are_both_replaced() -> None:
    class Twice(InlinedBlock):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (self.split(w, x) for w in (self.wq, self.wk, self.wv))
            return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        def split(self, w: nn.Module, x: Tensor) -> Tensor:
            y = w(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            return y.repeat_interleave(HEADS // y.shape[1], 1)

    torch.manual_seed(4)
    model = FlatTower(Twice).eval()
    result = convert(model, plan="identity", inputs=INPUTS)
    assert {s.owner.kind for s in result.report.sites if s.owner} == {"graph"}
    ids = torch.randint(0, 50, (3, 29))
    with torch.no_grad():
        assert (result.model(ids=ids) - model(ids=ids)).abs().max() <= 1e-4


def test_inlined_attention_is_found_in_the_graph() -> None:
    found = find_attention(tower(InlinedBlock), INPUTS)
    assert [(s.path, s.owner) for s in found.sites] == [
        ("blocks.0", "graph"),
        ("blocks.1", "graph"),
    ]
    rotary: Any = found.sites[0].spec.q.steps[1]
    assert rotary.pairing == "interleaved"
    assert rotary.inv_freq == pytest.approx((1.0, 0.5, 0.25, 0.125), rel=1e-6)
    assert found.sites[0].spec.core.kv_heads == 2


@pytest.mark.daily
@pytest.mark.parametrize("block", [NanoBlock, InlinedBlock])
def test_identity_saves_and_loads(block: type[nn.Module], tmp_path: Path) -> None:
    model = tower(block)
    out = tmp_path / "converted"
    result = convert(model, plan="identity", inputs=INPUTS, out=out)
    loaded = load(out, model=tower(block), inputs=INPUTS)
    for length in (17, 29):
        ids = torch.randint(0, 50, (3, length))
        with torch.no_grad():
            expected = model(ids=ids)
            assert (result.model(ids=ids) - expected).abs().max() <= 1e-4
            assert (loaded(ids=ids) - expected).abs().max() <= 1e-4
    names = set(dict(result.model.named_parameters()))
    assert not any(n.endswith(("wq.weight", "c_attn.weight")) for n in names)


@pytest.mark.slow
def test_inlined_attention_becomes_latent() -> None:
    model = tower(InlinedBlock)
    data = [{"ids": torch.randint(0, 50, (4, 31))} for _ in range(3)]
    plan = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 16, "qk_rope_head_dim": 16}]}
    result = convert(model, plan=plan, inputs=INPUTS, data=data)
    ids = torch.randint(0, 50, (3, 29))
    with torch.no_grad():
        assert (result.model(ids=ids) - model(ids=ids)).abs().max() <= 1e-4
    assert {s.owner.kind for s in result.report.sites if s.owner} == {"graph"}
    assert {s.exactness for s in result.report.sites} == {"exact"}
    lost = "no longer has: generate, train(), KV cache"
    for view in (result.report.to_markdown(), result.report.to_html()):
        assert view.count(lost) == 1  # once for both blocks
    assert not hasattr(result.model, "generate")
    with pytest.raises(NotImplementedError):
        result.model.train()
    smaller = {"rules": [{"sites": "*", "to": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": 8}]}
    fewer = convert(tower(InlinedBlock), plan=smaller, inputs=INPUTS, data=data)
    assert fewer.report.totals.cache_ratio == pytest.approx(20 / 32)


def test_a_graph_cannot_be_made_in_place() -> None:
    with pytest.raises(ArgumentError, match="becomes a graph"):
        convert(tower(InlinedBlock), plan="identity", inputs=INPUTS, inplace=True)


def test_inputs_are_asked_for() -> None:
    with pytest.raises(ArgumentError, match="example inputs"):
        find_attention(tower(NanoBlock))


def test_gradients_flow_through_a_rewritten_graph() -> None:
    result = convert(tower(InlinedBlock), plan="identity", inputs=INPUTS)
    result.model(ids=torch.randint(0, 50, (2, 9))).sum().backward()
    named = dict(result.model.named_parameters())
    grads = [p.grad for n, p in named.items() if "q_proj" in n]
    assert grads
    assert all(g is not None and bool((g != 0).any()) for g in grads)
