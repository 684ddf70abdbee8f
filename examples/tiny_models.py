"""Every architecture of the installed transformers, tiny and random, built from its config alone.

No architecture is named here: sizes shrink by what a config's fields are called, which is the
same few words everywhere. Where sizes must agree that no name tells of, `tiny_settings.py` has
them. What cannot be built so says why.
"""

from __future__ import annotations

import inspect
from typing import Any

from tiny_settings import SETTINGS, laid_over, more

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
LAYERS, WIDTH, HEADS, GROUPS, HEAD_DIM, VOCABULARY, WINDOW = 2, 64, 4, 2, 16, 99, 8

#: what a field is called -> its tiny value; the first match wins, exact names before endings
EXACT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "head_dim": HEAD_DIM, "d_kv": HEAD_DIM, "kv_channels": HEAD_DIM, "attention_head_dim": HEAD_DIM,
    "attention_head_size": HEAD_DIM, "v_head_dim": HEAD_DIM, "qk_nope_head_dim": HEAD_DIM,
    "qk_rope_head_dim": 8, "qk_head_dim": HEAD_DIM + 8, "kv_lora_rank": 24, "q_lora_rank": 32,
    "global_head_dim": HEAD_DIM, "rotary_dim": 8, "n_words": VOCABULARY,
    "sliding_window": WINDOW, "window_size": WINDOW, "local_attention": WINDOW,
    "attention_chunk_size": WINDOW, "attention_window": WINDOW, "sliding_window_size": WINDOW,
    "num_key_value_heads": GROUPS, "num_kv_heads": GROUPS, "num_key_value_heads_per_layer": None,
    "n_head_kv": GROUPS,
    "multi_query_group_num": GROUPS, "num_query_groups": GROUPS,
    "num_global_key_value_heads": GROUPS, "attention_groups": GROUPS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "num_expert_group": 1,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1, "router_top_k": 2,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "moe_num_shared_experts": 1,
    "image_size": 32, "patch_size": 8, "num_channels": 3, "num_labels": 2,
    "expert_capacity": 64, "query_pre_attn_scalar": HEAD_DIM, "embedding_size": WIDTH,
    "word_embed_proj_dim": WIDTH, "type_vocab_size": 2, "num_codebooks": 2,
    "hidden_size_per_layer_input": 8, "max_window_layers": 1, "num_kv_shared_layers": 0,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "sep_token_id": 2, "cls_token_id": 1, "forced_eos_token_id": None, "mask_token_id": 3,
    "forced_bos_token_id": None, "relative_attention_num_buckets": 8,
    "max_2d_position_embeddings": 64,
    "attn_layer_period": 2, "attn_layer_offset": 1,
    "entity_vocab_size": VOCABULARY, "entity_emb_size": WIDTH, "d_latents": WIDTH,
    "emb_dim": WIDTH, "num_latents": 16, "num_self_attends_per_block": LAYERS,
    "encoder_hash_byte_group_vocab": VOCABULARY,
    "d_conv": 4, "mamba_d_conv": 4, "chunk_size": 8, "mamba_chunk_size": 8,
}  # fmt: skip
ENDINGS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("_layers", "n_layer", "num_layer", "n_layers", "num_layers", "depth"), LAYERS),
    (("attention_heads", "n_head", "num_heads", "n_heads", "num_attn_heads"), HEADS),
    (("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    (("intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "mlp_dim"), 48),
    (("hidden_size", "d_model", "n_embd", "embed_dim", "model_dim", "hidden_dim"), WIDTH),
    (("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
)  # fmt: skip
#: fields that some classes leave open and then cannot do without
OPEN = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "vocab_size": VOCABULARY,
    "attn_layer_indices": [LAYERS - 1],
}
#: fields that say layer by layer what a layer is
KINDS = ("layer_types", "layers_block_type", "block_types")


#: the same, where that changes what other classes do
FILLED = {
    "pad_token_id": 0, "mask_token_id": 3, "n_shared_experts": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
#: one attempt after another: sizes left as they are, and what fills fields that a class leaves open
ATTEMPTS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((), {}),
    ((), FILLED),
    ((), {**FILLED, "layer_types": ["full_attention"] * LAYERS}),
    (("relative_attention_num_buckets",), {}),
    (ENDINGS[0][0], {}),
    ((*ENDINGS[0][0], "image_size", "window_size", "num_heads", "key_dim"), {}),
    ((*ENDINGS[0][0], "hidden_size", "intermediate_size", "head_dim", "_heads", "bottleneck_size"),
     {}),
    (("",), {}),
)  # fmt: skip


class CannotBuild(Exception):
    """Why an architecture has no tiny model."""


def architectures(task: str) -> list[tuple[str, str]]:
    """(model type, class name) of a task, each class once."""
    from transformers.models.auto import modeling_auto

    pairs: dict[str, str] = {}
    for kind, names in getattr(modeling_auto, TASKS[task]).items():
        name = names if isinstance(names, str) else names[0]
        pairs.setdefault(name, kind)
    return sorted((kind, name) for name, kind in pairs.items())


def build(kind: str, name: str) -> Any:
    """A tiny random model in eval mode.

    Raises:
        CannotBuild: its config refuses the small sizes, or needs a package that is not here.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    problems: list[str] = []
    causal = {other for _, other in architectures("causal-lm")}
    for kept, filled in ATTEMPTS:  # some patterns only hold at the default sizes
        try:
            model_class = getattr(transformers, name)
            config = tiny(model_class.config_class, kept, filled, name)
            if hasattr(config, "is_decoder") and name in causal:
                config.is_decoder = True
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > 30_000_000:
                raise CannotBuild(f"{size // 1_000_000} million parameters at the least")
            model = model_class(config).eval()
            with torch.no_grad():
                model(**inputs(model))
            return model
        except Exception as problem:
            lines = [line for line in str(problem).splitlines() if line.strip()] or [""]
            problems.append(f"{type(problem).__name__}: {' '.join(lines[:3])[:200]}")
    raise CannotBuild(problems[0])


def inputs(model: Any, batch: int = 2, length: int = 23) -> dict[str, Any]:
    """Example inputs of a model: those that reattend makes up, and what its class needs besides."""
    from reattend.inputs import made_up

    return more(type(model).__name__, model, made_up(model, batch, length))


def tiny(
    config_class: Any,
    kept: tuple[str, ...] = (),
    filled: dict[str, Any] | None = None,
    name: str = "",
) -> Any:
    """A config with every size shrunk but those whose names end so, and open fields filled.

    `name` is the model's class: what its fields do not say is in `tiny_settings.py`.
    """
    config = config_class()
    absent = {k: v for k, v in (filled or {}).items() if getattr(config, k, v) is None}
    return config_class(**laid_over({**shrunk(config, kept), **absent}, SETTINGS.get(name, {})))


def shrunk(config: Any, kept: tuple[str, ...] = ()) -> dict[str, Any]:
    """Arguments for a smaller config of the same class."""
    fields = {
        k: v for k, v in config.to_dict().items() if k not in ("model_type", "torch_dtype", "dtype")
    }
    fields.pop("transformers_version", None)
    own = inspect.signature(type(config).__init__).parameters
    names = set(own) | set(fields)
    out: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict) and hasattr(getattr(config, key, None), "to_dict"):
            out[key] = shrunk(getattr(config, key), kept)
            continue
        if kept and key.endswith(kept):
            continue
        new = small(key, value, fields)
        if new is not value and key in names:
            out[key] = new
    for kinds in () if kept else KINDS:
        if isinstance(fields.get(kinds), list) and fields[kinds]:
            out[kinds] = sample(fields[kinds])
            for key in ("num_hidden_layers", "n_layer", "num_layers"):
                if key in out:
                    out[key] = len(out[kinds])
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(key), dict):
            out[key] = rope(fields[key])
    return out


def sample(kinds: list[str]) -> list[str]:
    """The shortest start of a layer pattern that has every kind, at least two layers.

    Where a config leaves a hybrid without attention, its last layer gets some.
    """
    if set(kinds) == {"linear_attention"}:
        return [*kinds[: LAYERS - 1], "full_attention"]
    last = max(kinds.index(kind) for kind in set(kinds))
    return kinds[: max(LAYERS, min(last + 1, 8))]


def small(key: str, value: Any, fields: dict[str, Any]) -> Any:
    """The tiny value of a field, or the value itself."""
    if key == "head_dim" and "qk_rope_head_dim" in fields:
        return 8
    if key == "n_groups" and "num_heads" in fields:
        return 1
    if key == "head_dim" and "expand" in fields:
        return int(fields["expand"] * WIDTH) // HEADS
    if key == "default_language" and value is None and fields.get("languages"):
        return fields["languages"][0]
    if value is None and key in OPEN:
        return OPEN[key]
    if key == "embed_dim" and type(value) is int and isinstance(fields.get("num_heads"), list):
        return 8 * fields["num_heads"][0]
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        if key == "depths":
            return [min(v, 2) for v in value]
        if key == "image_size":
            return [32] * len(value)
        return value
    if not isinstance(value, int | float):
        return value
    if key in EXACT:
        new = EXACT[key]
        if key in ("num_key_value_heads", "num_kv_heads") and _heads(fields) == value:
            return HEADS
        if isinstance(value, int) and isinstance(new, int) and key != "head_dim":
            return min(value, new) if value > 0 else value
        return new
    for endings, new in ENDINGS:
        if key.endswith(endings):
            return min(value, new) if value > 0 else value
    return value


def _heads(fields: dict[str, Any]) -> Any:
    return fields.get("num_attention_heads", fields.get("num_heads"))


def rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters with per-frequency factors cut to the small head."""
    out: dict[str, Any] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            out[key] = rope(value)
        elif isinstance(value, list) and key in ("long_factor", "short_factor"):
            out[key] = value[: HEAD_DIM // 2]
        elif key == "mrope_section" and isinstance(value, list):
            out[key] = [2, 3, 3]
        else:
            out[key] = value
    return out


def livened(model: Any) -> None:
    """`liven` with the largest gain that keeps the outputs of a deep model finite."""
    import torch

    for gain in (2.0, 1.0, 0.5):
        liven(model, gain)
        with torch.no_grad():
            made = model(**inputs(model))
        floats = [t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
        if all(bool(torch.isfinite(t).any()) for t in floats if t.is_floating_point()):
            return


def liven(model: Any, gain: float = 2.0) -> None:
    """Re-draw weights: matrices at `gain` / sqrt(fan in), norms near one, biases nonzero.

    Attention logits are then of order one, so that no detail of a block is invisible. Frozen
    tables (sinusoids) mean something and stay.
    """
    import torch

    generator = torch.Generator().manual_seed(12)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.data = noise * (gain / parameter[0].numel() ** 0.5)
        else:
            near_one = bool((parameter.data == 1).all())
            parameter.data = (1.0 if near_one else 0.0) + 0.3 * noise
