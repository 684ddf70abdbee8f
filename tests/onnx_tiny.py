"""A tiny Llama, its conversions, and the logits an export must give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reattend import convert

VOCABULARY = 97
MLA = {"to": "mla", "kv_lora_rank": 10, "qk_rope_head_dim": 4}


def tiny(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()


def converted(plan: Any) -> Any:
    text = [torch.randint(0, VOCABULARY, (4, 32))]
    return convert(tiny(), plan=plan, data=text).model


def sequences(batch: int, length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, length))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def torch_logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
    return out.logits.numpy()
