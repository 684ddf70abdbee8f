"""The whole state dict of the stock class, in float64 where it is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.latent import LatentAttention
from reattend.targets.deepseek.host import Host
from reattend.targets.deepseek.shape import Shape
from reattend.targets.deepseek.weights import attention_tensors


def state_dict(
    host: Host, blocks: dict[str, LatentAttention], shape: Shape, stored: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """Tensors by DeepSeek's names, and the largest relative change by anchored norms.

    Args:
        host: everything but attention.
        blocks: latent mixers by path, in the order of layers.
        shape: of all of them.
        stored: the dtype the tensors will be rounded to.
    """
    out: dict[str, Tensor] = {}
    worst = 0.0
    out["model.embed_tokens.weight"] = _scaled(host.embedding, host.embedding_factor)
    for i, (path, layer) in enumerate(host.layers.items()):
        at = f"model.layers.{i}"
        attention, error = attention_tensors(
            blocks[path], shape, layer.before.gain, layer.attention_factor, stored
        )
        worst = max(worst, error)
        out |= {f"{at}.self_attn.{name}": tensor for name, tensor in attention.items()}
        mlp = layer.mlp
        out[f"{at}.mlp.gate_proj.weight"] = mlp.gate.detach()
        out[f"{at}.mlp.up_proj.weight"] = mlp.up.detach()
        out[f"{at}.mlp.down_proj.weight"] = _scaled(mlp.down, layer.mlp_factor)
        if mlp.biases is not None:
            gate, up, down = mlp.biases
            out[f"{at}.mlp.gate_proj.bias"] = gate.detach()
            out[f"{at}.mlp.up_proj.bias"] = up.detach()
            out[f"{at}.mlp.down_proj.bias"] = _scaled(down, layer.mlp_factor)
        out[f"{at}.input_layernorm.weight"] = layer.before.gain
        out[f"{at}.post_attention_layernorm.weight"] = layer.between.gain
    out["model.norm.weight"] = host.norm.gain
    if not host.tied or host.scaled:
        out["lm_head.weight"] = _scaled(host.head, host.head_factor)
    return out, worst


def _scaled(weight: Tensor, factor: float) -> Tensor:
    return weight.detach() if factor == 1.0 else weight.detach().double() * factor
