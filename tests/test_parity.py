"""Parity with models that cannot be decoded with a cache: nothing is asked of the converted one."""

from __future__ import annotations

import torch
import transformers as tf
from zoo_models import liven

from reattend import convert


def test_an_encoder_with_a_language_head_converts() -> None:
    """BERT as a bidirectional model has `past_key_values`, but its own cached decoding fails."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    model = tf.BertLMHeadModel(config).eval()
    liven(model)
    result = convert(model, plan="identity")
    names = [check.name for check in result.report.parity]
    assert "equals the original" in names
    assert not any("batch 3" in name for name in names)
    ids = torch.randint(8, 97, (2, 11))
    torch.testing.assert_close(result.model(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
