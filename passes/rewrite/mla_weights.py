"""The tensors of an MLA block: queries, down- and up-projections and biases, in float64.

Derivation with these names: docs/math/mla.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reattend.mixers.dense import DenseAttention
from reattend.mixers.latent_config import LatentConfig, has_own_query
from reattend.passes.rewrite.mla_latent import LatentChoice
from reattend.passes.rewrite.mla_norm import mean_square
from reattend.passes.rewrite.mla_rotary import RotaryChoice
from reattend.passes.rewrite.mla_sizes import folds_values
from reattend.statistics import SiteStatistics


def latent_weights(
    dense: DenseAttention,
    choice: RotaryChoice,
    latent: LatentChoice,
    config: LatentConfig,
    statistics: SiteStatistics,
    turn_Hdd: Tensor,
) -> dict[str, Tensor]:
    """Every tensor of the new mixer, float64; `turn_Hdd` stands in for dropped rotations."""
    core = config.core
    groups, d, e = core.kv_heads, core.qk_head_dim, core.v_head_dim
    key_width = groups * d
    old = {k: v.detach().double().cpu() for k, v in dense.state_dict().items()}
    scale_k, scale_v = dense.config.k.scale, dense.config.v.scale
    down, gain = latent.down, 1.0
    if config.latent_norm == "rms":  # entries of size one: the norm's eps is then small beside them
        gain = max(mean_square(down, statistics), 1e-300) ** 0.5
        down = down / gain
    rope_rows = torch.zeros(choice.key_rope.shape[0], latent.down.shape[1], dtype=torch.float64)
    rope_rows[:, :key_width] = choice.key_rope
    rows = torch.cat([down, rope_rows])
    normed = has_own_query(dense.config)
    state: dict[str, Tensor] = {}
    if normed:
        state["kv_a_proj_with_mqa.weight"] = rows
        state["k_proj.weight"], state["v_proj.weight"] = old["k_proj.weight"], old["v_proj.weight"]
        state["q_rope"] = choice.query_rope.reshape(-1, groups, d).transpose(0, 1) * scale_k
        state |= {k: v for k, v in old.items() if k.split(".")[0] in ("q_norm", "k_norm")}
        state |= _query_weights(old, lambda rows: rows, config, statistics)
        if "k_proj.bias" in old:
            state["k_proj.bias"] = old["k_proj.bias"]
    else:
        both = torch.cat([old["k_proj.weight"], old["v_proj.weight"]])
        state["kv_a_proj_with_mqa.weight"] = rows @ both
        widen = _widening(choice, config, scale_k, turn_Hdd)
        state |= _query_weights(old, widen, config, statistics)
        if config.rope_key_bias:
            state["k_rope_bias"] = choice.key_rope @ old["k_proj.bias"]
    up = torch.cat(
        [
            (latent.key_up * scale_k).reshape(groups, d, -1),
            (latent.value_up * scale_v).reshape(groups, e, -1),
        ],
        1,
    )
    up = up.flatten(0, 1)
    if config.latent_norm == "rms":
        state["kv_a_layernorm.weight"] = torch.full((config.kv_lora_rank,), gain)
    state["kv_b_proj.weight"] = up
    outside = ("o_proj", "sinks", "relative", "g_proj", "joint")
    state |= {k: v for k, v in old.items() if k.split(".")[0] in outside}
    if config.key_bias:
        b = choice.nope_up @ choice.key_nope @ old["k_proj.bias"]
        state["k_bias"] = (b * scale_k).reshape(groups, d)
    if config.value_bias or (config.out_bias and folds_values(dense.config)):
        bias = (latent.value_mean + old.get("v_proj.bias", 0.0)) * scale_v
        bias = bias.reshape(groups, e)
        if config.value_bias:
            state["v_bias"] = bias
        else:
            spread = bias.repeat_interleave(core.heads // groups, 0).flatten()
            state["o_proj.bias"] = old["o_proj.weight"] @ spread + old.get("o_proj.bias", 0.0)
    return state


def _widening(
    choice: RotaryChoice, config: LatentConfig, scale_k: float, turn_Hdd: Tensor
) -> Callable[[Tensor], Tensor]:
    """q rows per head [nope d | rope R]: the head turned, and its share of the rotated slots."""
    core = config.core
    heads, groups, d = core.heads, core.kv_heads, core.qk_head_dim
    slots_gRd = choice.query_rope.reshape(-1, groups, d).transpose(0, 1) * scale_k
    slots_hRd = slots_gRd.repeat_interleave(heads // groups, 0)

    def widen(rows: Tensor) -> Tensor:
        per_head = rows.reshape(heads, d, -1)
        return torch.cat([turn_Hdd @ per_head, slots_hRd @ per_head], 1).flatten(0, 1)

    return widen


def _query_weights(
    old: dict[str, Tensor],
    widen: Callable[[Tensor], Tensor],
    config: LatentConfig,
    statistics: SiteStatistics,
) -> dict[str, Tensor]:
    """The query projection, whole or in two factors; a bias (and a norm) comes after both."""
    if config.q.opaque is not None:
        return {k: v for k, v in old.items() if k.startswith("q_proj.")}
    last = "q_proj" if config.q_lora_rank is None else "q_proj.q_b_proj"
    bias = {}
    if config.q.bias:
        bias[f"{last}.bias"] = widen(old["q_proj.bias"][:, None])[:, 0]
    if config.q_lora_rank is None:
        return {"q_proj.weight": widen(old["q_proj.weight"]), **bias}
    assert statistics.query_gram is not None
    values, vectors = torch.linalg.eigh(statistics.query_gram)
    basis = vectors[:, torch.argsort(values, descending=True)][:, : config.q_lora_rank]
    return {
        "q_proj.q_a_proj.weight": basis.t() @ old["q_proj.weight"],
        "q_proj.q_b_proj.weight": widen(basis),
        **bias,
    }
