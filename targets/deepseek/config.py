"""The stock configuration: a DeepSeek model whose layers are all dense."""

from __future__ import annotations

from typing import Any

import torch

from reattend.targets.deepseek.host import Host
from reattend.targets.deepseek.rope import rope_parameters
from reattend.targets.deepseek.shape import Shape, Version


def classes(version: Version) -> tuple[Any, Any, Any]:
    """Config, model and rotary class of transformers."""
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as two
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as three

    if version == "v3":
        return (
            transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM,
            three.DeepseekV3RotaryEmbedding,
        )  # fmt: skip
    return (
        transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM,
        two.DeepseekV2RotaryEmbedding,
    )  # fmt: skip


def stock_config(
    version: Version, host: Host, shape: Shape, original: Any, dtype: torch.dtype
) -> tuple[Any, bool]:
    """The config, and whether its rotary table is the plain one.

    Args:
        version: which class.
        host: the parts around attention.
        shape: sizes of attention.
        original: config of the converted model.
        dtype: of the stored weights.
    """
    config_class, model_class, rotary_class = classes(version)
    layers = list(host.layers.values())
    mlp = layers[0].mlp
    text = original.get_text_config()
    own = {
        name: getattr(original, name, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    fields: dict[str, Any] = {
        "vocab_size": host.embedding.shape[0],
        "hidden_size": host.embedding.shape[1],
        "intermediate_size": mlp.gate.shape[0],
        "num_hidden_layers": len(layers),
        "first_k_dense_replace": len(layers),
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "kv_lora_rank": shape.rank,
        "q_lora_rank": None if shape.q_rank is None else shape.q_rank + 1,
        "qk_nope_head_dim": shape.nope,
        "qk_rope_head_dim": shape.rope,
        "v_head_dim": shape.value,
        "hidden_act": mlp.act,
        "rms_norm_eps": host.norm.eps,
        "attention_bias": shape.biased,
        "max_position_embeddings": int(text.max_position_embeddings),
        "initializer_range": float(getattr(text, "initializer_range", 0.02)),
        "tie_word_embeddings": host.tied and not host.scaled,
        "architectures": [model_class.__name__],
        **own,
    }
    if version == "v3":
        fields |= {"rope_interleave": True, "num_nextn_predict_layers": 0}
    else:
        fields |= {"mlp_bias": mlp.biases is not None}

    def build(parameters: dict[str, Any]) -> tuple[torch.Tensor, float]:
        rotary = rotary_class(config_class(**fields, rope_parameters=dict(parameters)))
        return rotary.inv_freq, float(rotary.attention_scaling)

    rope, plain = rope_parameters(build, text, shape.frequencies)
    config = config_class(**fields, rope_parameters=rope)
    config.dtype = dtype
    return config, plain
