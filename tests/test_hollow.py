"""A model without weights is read like one with them, takes no memory, and claims no proof."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
import zoo_models
from torch import Tensor, nn

from reattend import convert, find_attention
from reattend.errors import ModelError
from reattend.hollow import empty, hollow, stand_in


def test_a_stand_in_has_a_shape_and_no_size() -> None:
    weight = stand_in(torch.empty(3000, 2000, device="meta", dtype=torch.bfloat16), 1)
    assert (weight.shape, weight.dtype) == ((3000, 2000), torch.bfloat16)
    assert weight.untyped_storage().nbytes() == 2 * 4999
    assert len({float(v) for v in weight[:50, 0]}) > 40  # rows differ, so values tell them apart


@pytest.mark.parametrize("name", ["gemma3", pytest.param("t5", marks=pytest.mark.slow)])
def test_the_same_is_read_without_weights(name: str) -> None:
    model = zoo_models.build(name, None)
    with_weights = find_attention(model)
    with torch.device("meta"):
        bare = type(model)(model.config).eval()
    found = find_attention(bare)
    assert [s.path for s in found.sites] == [s.path for s in with_weights.sites]
    assert [s.spec for s in found.sites] == [s.spec for s in with_weights.sites]
    assert not any(s.verified for s in found.sites)
    assert all("waits" in s.deferred for s in found.sites)
    assert all(p.device.type == "meta" for p in bare.parameters())


def test_memory_does_not_grow_with_the_weights() -> None:
    config = tf.LlamaConfig(num_hidden_layers=2)  # 7B widths: 666 M numbers here
    model = empty(tf.LlamaForCausalLM, config)
    made = hollow(model)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made.parameters()}
    assert sum(p.numel() for p in made.parameters()) > 6e8
    assert sum(held.values()) < 2e6
    assert made.model.rotary_emb.inv_freq.device.type == "cpu"  # type: ignore[union-attr]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("bias", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = self.bias[: x.shape[1]]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).flatten(2)


def test_a_buffer_without_data_is_no_guess() -> None:
    with torch.device("meta"):
        model = Masked()
    with pytest.raises(ModelError, match="a buffer of the model has no data"):
        find_attention(model, {"x": torch.randn(2, 7, 16)})


def test_nothing_is_converted_without_weights() -> None:
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo_models.DECODER))
    with pytest.raises(ModelError, match="not in memory"):
        convert(model, plan="identity")
