"""Small models of several families for checkpoints in DeepSeek's layout."""

from __future__ import annotations

from typing import Any

import transformers as tf

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 128}  # fmt: skip
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 2.0,
           "attention_multiplier": 0.2, "tie_word_embeddings": True}  # fmt: skip


def llama(**own: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **own}))


def pair() -> Any:
    return llama(num_hidden_layers=2)


def qwen2() -> Any:
    fields = {k: v for k, v in SIZES.items() if k != "head_dim"}
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**fields))


def phi3() -> Any:
    fields = {k: v for k, v in SIZES.items() if k != "head_dim"}
    return tf.Phi3ForCausalLM(tf.Phi3Config(**fields))


def gemma() -> Any:
    config = tf.GemmaConfig(**SIZES)
    config._attn_implementation = "eager"
    return tf.GemmaForCausalLM(config)


def granite() -> Any:
    return tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, **GRANITE))
