"""Some KV groups of a block as a block of their own, without the output projection.

A plan's `heads` converts KV groups apart: each part is a normal form with fewer heads, so every
conversion builds it as it builds a whole block. Rows are gathered, never multiplied; the tensors
of a part are copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reattend.errors import ModelError
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseAttention, DenseConfig


def why_whole(config: DenseConfig) -> str | None:
    """What ties the heads of a block together, or None where they can be converted apart."""
    for name, stream in (("queries", config.q), ("keys", config.k), ("values", config.v)):
        if stream.norm is not None and stream.norm.scope == "full":
            return f"{name} are normalised over all heads at once"
        if stream.opaque is not None:
            return f"{name} are made by the model's own steps"
    if config.added is not None:
        return "the model's own steps add to the scores of all heads"
    if config.join is not None:
        return "the model's own steps join the heads"
    return None


def query_heads(core: CoreConfig, kv_heads: Sequence[int]) -> list[int]:
    """The query heads that read these KV groups, in the normal form's order."""
    each = core.heads // core.kv_heads
    return [g * each + i for g in kv_heads for i in range(each)]


def picked(x_BHNd: Tensor, heads: Sequence[int]) -> Tensor:
    """These heads of a tensor [B, H, ..]; the tensor itself where that is all of them in order."""
    if list(heads) == list(range(x_BHNd.shape[1])):
        return x_BHNd
    return x_BHNd.index_select(1, torch.tensor(heads, device=x_BHNd.device))


def part_config(config: DenseConfig, kv_heads: Sequence[int]) -> DenseConfig:
    """The description of the part."""
    heads = query_heads(config.core, kv_heads)
    core = config.core.model_copy(update={"heads": len(heads), "kv_heads": len(kv_heads)})
    alibi = None if config.alibi is None else tuple(config.alibi[h] for h in heads)
    changed = {"core": core, "out_features": None, "out_bias": False, "alibi": alibi}
    return config.model_copy(update=changed)


def part(dense: DenseAttention, kv_heads: Sequence[int]) -> DenseAttention:
    """The normal form of these KV groups, with copies of their weights.

    Raises:
        ModelError: the block has a tensor that no rule here divides among heads.
    """
    heads = query_heads(dense.config.core, kv_heads)
    return holding(part_config(dense.config, kv_heads), _picked_state(dense, kv_heads, heads))


def reordered(dense: DenseAttention, kv_heads: Sequence[int]) -> DenseAttention:
    """The same block with its KV groups, and the heads that read them, in another order.

    Args:
        dense: the block.
        kv_heads: the number in `dense` of each group of the result; all of them, once.

    Raises:
        ModelError: as `part`.
    """
    return kept_heads(dense, kv_heads, query_heads(dense.config.core, kv_heads))


def kept_heads(
    dense: DenseAttention, kv_heads: Sequence[int], heads: Sequence[int]
) -> DenseAttention:
    """The block with some of its heads, output projection included; copies of their weights.

    Args:
        dense: the block.
        kv_heads: the number in `dense` of each KV group of the result.
        heads: of each query head; equally many for every group, in its order.

    Raises:
        ModelError: as `part`.
    """
    core = dense.config.core
    outside: dict[str, Any] = {
        "out_features": dense.config.out_features,
        "out_bias": dense.config.out_bias,
    }
    if dense.config.alibi is not None:
        outside["alibi"] = tuple(dense.config.alibi[h] for h in heads)
    config = part_config(dense.config, kv_heads)
    fewer = config.core.model_copy(update={"heads": len(heads)})
    state = _picked_state(dense, kv_heads, heads)
    if isinstance(dense.o_proj, torch.nn.Linear):
        columns = dense.o_proj.weight.detach().t()
        state["o_proj.weight"] = rows_of(columns, heads, core.heads).t().contiguous()
        if dense.o_proj.bias is not None:
            state["o_proj.bias"] = dense.o_proj.bias.detach()
    return holding(config.model_copy(update={**outside, "core": fewer}), state)


def _picked_state(
    dense: DenseAttention, kv_heads: Sequence[int], heads: Sequence[int]
) -> dict[str, Tensor]:
    """Everything but the output projection."""
    core = dense.config.core
    picked = {"q": list(heads), "k": list(kv_heads), "v": list(kv_heads)}
    totals = {"q": core.heads, "k": core.kv_heads, "v": core.kv_heads}
    state: dict[str, Tensor] = {}
    for name, tensor in dense.state_dict().items():
        module, stream = name.split(".")[0], name[0]
        if module == "o_proj":
            continue
        if module in ("q_proj", "k_proj", "v_proj"):
            state[name] = rows_of(tensor, picked[stream], totals[stream])
        elif module in ("q_norm", "k_norm", "v_norm"):
            state[name] = tensor.clone()
        elif name == "sinks":
            state[name] = tensor[picked["q"]].clone()
        elif module == "g_proj":
            state[name] = rows_of(tensor, picked["q"], core.heads)
        elif name == "relative.weight":
            state[name] = tensor[:, picked["q"]].clone()
        else:
            raise ModelError(f"the heads of a block with {name} cannot be converted apart")
    return state


def holding(config: DenseConfig, state: dict[str, Tensor]) -> DenseAttention:
    """A normal form of these tensors, trainable, in eval mode."""
    with torch.device("meta"):
        mixer = DenseAttention(config)
    mixer.load_state_dict(state, strict=True, assign=True)
    for parameter in mixer.parameters():
        parameter.requires_grad_(True)
    return mixer.eval()


def rows_of(tensor: Tensor, heads: Sequence[int], total: int) -> Tensor:
    """The rows [heads x width, ...] of some of `total` heads, a copy."""
    by_head: Tensor = tensor.unflatten(0, (total, -1))
    return by_head[list(heads)].flatten(0, 1)
