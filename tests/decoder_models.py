"""Tiny decoders for the tests of caches, and prompts padded on the left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
WINDOW = {"sliding_window": 8}
MODELS: dict[str, Any] = {
    "llama": lambda **own: LlamaForCausalLM(LlamaConfig(**COMMON, **own)),
    "mistral": lambda **own: MistralForCausalLM(MistralConfig(**COMMON, **WINDOW, **own)),
    "gemma2": lambda **own: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, **WINDOW, query_pre_attn_scalar=8, **own)
    ),
}


def decoder(name: str, layers: int, groups: int) -> Any:
    """A random model that never stops by itself; `groups` key/value heads."""
    torch.manual_seed(5)
    model = MODELS[name](num_hidden_layers=layers, num_key_value_heads=groups).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows of 13 tokens, 0, 3 and 7 of them padding; and the mask."""
    ids = torch.randint(3, 97, (3, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 7)):
        mask[row, :pad] = 0
        ids[row, :pad] = 0
    return ids, mask
