"""Tiny models of every architecture the suite converts: built from config, O(1) activations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from tiny_models import liven  # noqa: E402

__all__ = ["MORE", "ZOO", "build", "liven"]

VOCABULARY = 97
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def _sized(layers: int, *without: str) -> dict[str, Any]:
    found = {**DECODER, "num_hidden_layers": layers}
    return {k: v for k, v in found.items() if k not in without}


def _encoder(layers: int) -> dict[str, Any]:
    return {**ENCODER, "num_hidden_layers": layers}


def _gemma3_vision(_: int) -> Any:
    text = {**DECODER, "sliding_window": 8, "query_pre_attn_scalar": 8, "num_hidden_layers": 2}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    vision = {**ENCODER, "image_size": 16, "patch_size": 4, "num_channels": 3}
    config = tf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5,
        image_token_id=5,
        boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    return tf.Gemma3ForConditionalGeneration(config)


ZOO: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: tf.LlamaForCausalLM(tf.LlamaConfig(**_sized(n))),
    "mistral": lambda n: tf.MistralForCausalLM(tf.MistralConfig(**_sized(n), sliding_window=8)),
    "qwen2": lambda n: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_sized(n, "head_dim"))),
    "qwen3": lambda n: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_sized(n))),
    "gemma2": lambda _: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**_sized(2), sliding_window=8, query_pre_attn_scalar=8)
    ),
    "gemma3": lambda _: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **_sized(2), sliding_window=8, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "phi3": lambda n: tf.Phi3ForCausalLM(tf.Phi3Config(**_sized(n, "head_dim"))),
    "gpt2": lambda n: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=n, n_head=4, n_positions=512,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ),
    "gpt_neox": lambda n: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(**_sized(n, "num_key_value_heads", "head_dim"), rotary_pct=0.5)
    ),
    "bert": lambda n: tf.BertForMaskedLM(
        tf.BertConfig(**_encoder(n), vocab_size=VOCABULARY, max_position_embeddings=512)
    ),
    "vit": lambda n: tf.ViTForImageClassification(
        tf.ViTConfig(**_encoder(n), image_size=16, patch_size=4)
    ),
    "t5": lambda n: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=n, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
        )
    ),
    "gemma3_vision": _gemma3_vision,
}  # fmt: skip


#: further spellings, each in the one its class prefers: scaled queries, fused groups, interleaved
#: and partial rotary, norms over the full width, a router beside attention, scaled tables, chunks,
#: a norm before the output projection, one layer called again and again, logit sinks, ALiBi in two
#: spellings, heads folded into the batch, a norm and a gate after the core, clipped streams, a gain
#: per head
MORE: dict[str, Callable[[int], Any]] = {
    "opt": lambda n: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=n,
            num_attention_heads=4, word_embed_proj_dim=32, eos_token_id=None, pad_token_id=0,
        )
    ),
    "falcon": lambda n: tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=n, num_attention_heads=4,
            num_kv_heads=2, new_decoder_architecture=True, eos_token_id=None, pad_token_id=0,
        )
    ),
    "stablelm": lambda n: tf.StableLmForCausalLM(tf.StableLmConfig(**_sized(n, "head_dim"))),
    "cohere": lambda n: tf.CohereForCausalLM(tf.CohereConfig(**_sized(n, "head_dim"))),
    "olmo2": lambda n: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_sized(n, "head_dim"))),
    "gptj": lambda n: tf.GPTJForCausalLM(
        tf.GPTJConfig(
            vocab_size=VOCABULARY, n_embd=32, n_layer=n, n_head=4, rotary_dim=4, n_positions=64,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ),
    "bitnet": lambda n: tf.BitNetForCausalLM(tf.BitNetConfig(**_sized(n, "head_dim"))),
    "albert": lambda _: tf.AlbertForMaskedLM(
        tf.AlbertConfig(**ENCODER, embedding_size=16, vocab_size=VOCABULARY)
    ),
    "mixtral": lambda n: tf.MixtralForCausalLM(tf.MixtralConfig(**_sized(n), num_local_experts=4)),
    "llama_yarn": lambda n: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            **_sized(n),
            rope_parameters={
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                "original_max_position_embeddings": 128,
            },
        )
    ),
    "gpt_oss": lambda n: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **_sized(n), num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
    "falcon_alibi": lambda n: tf.FalconForCausalLM(
        tf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=n, num_attention_heads=4,
            alibi=True, multi_query=False, eos_token_id=None, pad_token_id=0,
        )
    ),
    "mpt": lambda n: tf.MptForCausalLM(
        tf.MptConfig(
            vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=n, max_seq_len=128,
            eos_token_id=None, pad_token_id=0,
        )
    ),
    "xglm": lambda n: tf.XGLMForCausalLM(
        tf.XGLMConfig(
            vocab_size=VOCABULARY, d_model=32, ffn_dim=48, num_layers=n, attention_heads=4,
            eos_token_id=None, pad_token_id=0,
        )
    ),
    "olmo_clip": lambda n: tf.OlmoForCausalLM(tf.OlmoConfig(**_sized(n, "head_dim"), clip_qkv=1.0)),
    "cohere_norm": lambda n: tf.CohereForCausalLM(
        tf.CohereConfig(**_sized(n, "head_dim"), use_qk_norm=True)
    ),
    "bloom": lambda n: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=n, n_head=4)
    ),
    "gpt_neo": lambda _: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
            attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=None,
            pad_token_id=0,
        )
    ),
    "diffllama": lambda n: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**_sized(n))),
    "hrm_text": lambda _: tf.HrmTextForCausalLM(
        tf.HrmTextConfig(
            **_sized(1, "num_key_value_heads")
        )
    ),
    "qwen3_next": lambda n: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(**_sized(n), layer_types=["full_attention"] * n, num_experts=0)
    ),
}  # fmt: skip


def build(name: str, attention: str | None = "sdpa", layers: int = 2) -> Any:
    """A random model whose attention logits are of order one, so no detail is invisible.

    Where layers differ by design, or are one and the same, there are always two.
    """
    torch.manual_seed(11)
    model = (ZOO.get(name) or MORE[name])(layers).eval()
    liven(model)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model
