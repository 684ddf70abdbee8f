"""What the names of a config's fields do not say: sizes that must agree, per class.

Each entry is laid over the shrunk fields of its class (`tiny_models.py`), nested configs included.
Only this builder of small models knows these names; what finds and converts attention knows none.
"""

from __future__ import annotations

from typing import Any

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_ENCODER = {"num_filters": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    # widths of one config that are another config's width
    "BltForCausalLM": {
        "encoder_config": {"hidden_size_global": 64}, "decoder_config": {"hidden_size_global": 64},
    },
    # rotary settings of each kind of layer; the default has none
    "CohereCompassForCausalLM": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": _DEFAULT_ROPE, "full_attention": _DEFAULT_ROPE,
        },
    },
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    # layers that have sizes of their own, by number
    "Dots3NoteForCausalLM": {
        "num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"], "head_dim": 24,
        "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 2}},
    },
    "InklingForCausalLM": {
        "num_hidden_layers": 2, "layer_types": ["hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse"], "swa_num_key_value_heads": 2,
        "swa_head_dim": 16, "rel_extent": 16, "d_rel": 8,
    },
    "Inkling2ForCausalLM": {
        "num_hidden_layers": 2, "layer_types": ["hybrid_sliding", "hybrid"],
        "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 16, "d_rel": 8,
        "unpadded_vocab_size": 99,
    },
    "Qwen4ExpForCausalLM": {
        "num_hidden_layers": 2, "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 64, "indexer_compress_ratio": 4, "ple_embed_dim": 64,
    },
    # its images are read by a model of another package, which has no small one of this kind
    "Gemma3nForConditionalGeneration": {
        "vision_config": {"architecture": "resnet18", "hidden_size": 64},
    },
    # attention reads two streams side by side: twice the width; weights are shared by two layers
    "ZambaForCausalLM": {
        "num_hidden_layers": 4, "attention_hidden_size": 128, "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_dt_rank": 4,
    },
    "Zamba2ForCausalLM": {
        "num_hidden_layers": 4, "attention_hidden_size": 128, "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_headdim": 16,
    },
    # a nested config that is read before it is made
    "MusicFlamingoForConditionalGeneration": {
        "audio_config": {"model_type": "audioflamingo3_encoder"}, "head_dim": 64,
    },
    "Nemotron3_5TranscribeForConditionalGeneration": {
        "word_timestamp_config": {"blank_token_id": 98},
        "text_config": {"n_groups": 2, "num_key_value_heads": 2},
    },
    "VibeVoiceAsrForConditionalGeneration": {
        "acoustic_tokenizer_encoder_config": _ENCODER,
        "semantic_tokenizer_encoder_config": _ENCODER,
    },
    "VoxtralRealtimeForConditionalGeneration": {"audio_config": {"num_mel_bins": 16}},
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
    },
    "ShieldGemma2ForImageClassification": {"yes_token_index": 5, "no_token_index": 6},
}  # fmt: skip


def more(name: str, model: Any, made: dict[str, Any]) -> dict[str, Any]:
    """Example inputs of a class whose calls hold what no signature tells; `made` for others.

    Args:
        name: of the class.
        model: an instance.
        made: what reattend makes up.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    batch, length = made["input_ids"].shape if "input_ids" in made else (0, 0)
    config = model.config
    if name == "VoxtralRealtimeForConditionalGeneration":  # 8 frames of sound for each token
        bins, frames = config.audio_config.num_mel_bins, 2 * config.downsample_factor * length
        return made | {"input_features": torch.randn(batch, bins, frames, generator=generator)}
    return made


def laid_over(fields: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`fields` with `settings`, nested dicts of both joined unless they are rotary settings."""
    out = dict(fields)
    for key, value in settings.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = laid_over(out[key], value) if nested and key.endswith("_config") else value
    return out
