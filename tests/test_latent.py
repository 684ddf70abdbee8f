"""Multi-head latent attention is known for what it is, whoever wrote it, and left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers as tf
import zoo_models
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.errors import NothingFoundError
from reattend.passes.find.latent import LatentForm

WIDTH, HEADS, RANK, ROPE = 32, 4, 12, 6
SIZES = {
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 6,
    "first_k_dense_replace": 2,
}  # fmt: skip


def deepseek(kind: str) -> Any:
    torch.manual_seed(0)
    plain = {k: v for k, v in zoo_models.DECODER.items() if k != "head_dim"}
    plain["num_key_value_heads"] = 4
    if kind == "v3":
        config = tf.DeepseekV3Config(**plain, **SIZES, q_lora_rank=12, n_group=1, topk_group=1)
        return tf.DeepseekV3ForCausalLM(config).eval()
    rank = 12 if kind == "v2 with query ranks" else None
    return tf.DeepseekV2ForCausalLM(tf.DeepseekV2Config(**plain, **SIZES, q_lora_rank=rank)).eval()


@pytest.mark.daily
@pytest.mark.parametrize(("kind", "rank"), [("v2", None), ("v3", 12), ("v2 with query ranks", 12)])
def test_deepseek(kind: str, rank: int | None) -> None:
    model = deepseek(kind)
    found = find_attention(model)
    assert not found.sites
    assert [r.path for r in found.refused] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert all(r.latent == LatentForm(4, 16, 8, rank) and r.verified for r in found.refused)
    if kind == "v3":
        with pytest.raises(NothingFoundError, match="already latent.* kv_lora_rank 16"):
            convert(model, plan="identity")


class Latent(nn.Module):
    """MLA in other words: two maps up, the rotated key from a projection of its own, no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Linear(WIDTH, HEADS * (8 + ROPE))
        self.squeeze, self.turned = nn.Linear(WIDTH, RANK), nn.Linear(WIDTH, ROPE)
        self.keys, self.values = nn.Linear(RANK, HEADS * 8), nn.Linear(RANK, HEADS * 8)
        self.out = nn.Linear(HEADS * 8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        c = self.squeeze(x)
        shared = self.turned(x)[:, None].expand(-1, HEADS, -1, -1)
        k = torch.cat([heads(self.keys(c)), shared], -1)
        y = F.scaled_dot_product_attention(
            heads(self.queries(x)), k, heads(self.values(c)), is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Ordinary(nn.Module):
    def __init__(self, chain: str = "") -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, RANK) if chain else None
        self.qkv = nn.Linear(RANK if chain else WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first is None else self.first(x)
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v.cumsum(2), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


INPUTS = {"ids": torch.arange(2 * 17).reshape(2, 17) % 50}


def test_other_spellings_are_seen_by_how_they_depend() -> None:
    torch.manual_seed(2)
    found = find_attention(Model(Latent()).eval(), INPUTS)
    assert [r.latent for r in found.refused] == [LatentForm(HEADS, RANK, ROPE, None)]
    assert "already latent" in found.refused[0].reason


@pytest.mark.parametrize("chain", ["", "all"])
def test_a_narrow_layer_that_queries_share_is_no_latent(chain: str) -> None:
    """Its values mix tokens: where there is no cache, these are the block's own steps."""
    model = Model(Ordinary(chain)).eval()
    found = find_attention(model, INPUTS)
    assert [s.path for s in found.sites] == ["blocks.0"]
    assert not found.refused
    converted = convert(model, plan="identity", inputs=INPUTS).model
    with torch.no_grad():
        for batch, length in ((2, 17), (3, 29)):
            x = {"ids": torch.randint(0, 50, (batch, length))}
            assert (converted(**x) - model(**x)).abs().max() <= 1e-5


def test_identity_converts_the_rest_and_leaves_latent_blocks() -> None:
    class Plain(Ordinary):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(2)
    model = Model(Plain(), Latent()).eval()
    result = convert(model, plan="identity", inputs=INPUTS)
    assert result.report.totals.converted == 1
    assert type(result.model.get_submodule("blocks.1")) is Latent
    with torch.no_grad():
        assert (result.model(**INPUTS) - model(**INPUTS)).abs().max() <= 1e-5
