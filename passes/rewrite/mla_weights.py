"""The tensors of an MLA block: queries, down- and up-projections and biases, in float64.

What the conversion leaves as it was (the output projection; before a key norm all projections) is
the block's own tensor, not a copy. Derivation with these names: docs/math/mla.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.latent_config import LatentConfig, has_own_query
from reattend.passes.rewrite.mla_latent import LatentChoice
from reattend.passes.rewrite.mla_norm import mean_square
from reattend.passes.rewrite.mla_rotary import RotaryChoice
from reattend.passes.rewrite.mla_sizes import folds_values
from reattend.statistics import SiteStatistics

#: Columns of the input that are multiplied in float64 at once.
COLUMNS = 512


def latent_weights(
    dense: DenseAttention,
    choice: RotaryChoice,
    latent: LatentChoice,
    config: LatentConfig,
    statistics: SiteStatistics,
    turn_Hdd: Tensor,
) -> dict[str, Tensor]:
    """Every tensor of the new mixer; `turn_Hdd` stands in for dropped rotations.

    New tensors are float64, but for what the whole input is read by: query rows are rounded to the
    block's dtype head by head, `kv_a_proj_with_mqa` a few columns at a time.
    """
    core = config.core
    groups, d, e = core.kv_heads, core.qk_head_dim, core.v_head_dim
    key_width = groups * d
    own = {name: tensor.detach() for name, tensor in dense.state_dict().items()}
    scale_k, scale_v = dense.config.k.scale, dense.config.v.scale
    down, gain = latent.down, 1.0
    if config.latent_norm == "rms":  # entries of size one: the norm's eps is then small beside them
        gain = max(mean_square(down, statistics), 1e-300) ** 0.5
        down = down / gain
    rope_rows = torch.zeros(choice.key_rope.shape[0], latent.down.shape[1], dtype=torch.float64)
    rope_rows[:, :key_width] = choice.key_rope
    rows = torch.cat([down, rope_rows])
    normed = has_own_query(dense.config)
    kept = kept_modules(dense.config, config.q_lora_rank)
    state = {name: tensor for name, tensor in own.items() if name.split(".")[0] in kept}
    state.pop("v_proj.bias", None)  # moves through the attention: below
    if normed:
        state["kv_a_proj_with_mqa.weight"] = rows
        state["q_rope"] = choice.query_rope.reshape(-1, groups, d).transpose(0, 1) * scale_k
        state |= _query_weights(own, lambda rows: rows, config, statistics)
    else:
        both, dtype = (own["k_proj.weight"], own["v_proj.weight"]), own["k_proj.weight"].dtype
        state["kv_a_proj_with_mqa.weight"] = torch.cat(
            [
                (rows @ _wide(torch.cat(parts))).to(dtype)
                for parts in zip(*(w.split(COLUMNS, 1) for w in both), strict=True)
            ],
            1,
        )
        widen = _widening(choice, config, scale_k, turn_Hdd, dtype)
        state |= _query_weights(own, widen, config, statistics)
        if config.rope_key_bias:
            state["k_rope_bias"] = choice.key_rope @ _wide(own["k_proj.bias"])
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
    if config.key_bias:
        b = choice.nope_up @ choice.key_nope @ _wide(own["k_proj.bias"])
        state["k_bias"] = (b * scale_k).reshape(groups, d)
    if config.value_bias or (config.out_bias and folds_values(dense.config)):
        bias = latent.value_mean
        if "v_proj.bias" in own:
            bias = bias + _wide(own["v_proj.bias"])
        bias = bias * scale_v
        bias = bias.reshape(groups, e)
        if config.value_bias:
            state["v_bias"] = bias
        else:
            spread = bias.repeat_interleave(core.heads // groups, 0).flatten()
            moved = _wide(own["o_proj.weight"]) @ spread
            if "o_proj.bias" in own:
                moved = moved + _wide(own["o_proj.bias"])
            state["o_proj.bias"] = moved
    return state


def kept_modules(config: DenseConfig, q_lora_rank: int | None) -> tuple[str, ...]:
    """Whose tensors an MLA block takes over from the block it replaces, as they are."""
    kept: tuple[str, ...] = ("o_proj", "sinks", "relative", "g_proj", "joint")
    if has_own_query(config):
        kept += ("q_norm", "k_norm", "k_proj", "v_proj")
        kept += ("q_proj",) if q_lora_rank is None else ()
    return kept


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double().cpu()


def _widening(
    choice: RotaryChoice, config: LatentConfig, scale_k: float, turn_Hdd: Tensor, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """q rows per head [nope d | rope R]: the head turned, and its share of the rotated slots."""
    core = config.core
    heads, groups, d = core.heads, core.kv_heads, core.qk_head_dim
    slots_gRd = choice.query_rope.reshape(-1, groups, d).transpose(0, 1) * scale_k
    slots_hRd = slots_gRd.repeat_interleave(heads // groups, 0)

    def widen(rows: Tensor) -> Tensor:
        # One head at a time: in float64 all of them are eight times the projection they replace.
        heads_Hdn = rows.reshape(heads, d, -1)
        made = torch.empty(heads, d + slots_hRd.shape[1], heads_Hdn.shape[2], dtype=dtype)
        for new, turn, slots, head in zip(made, turn_Hdd, slots_hRd, heads_Hdn, strict=True):
            wide = _wide(head)
            new[:d], new[d:] = turn @ wide, slots @ wide
        return made.flatten(0, 1)

    return widen


def _query_weights(
    own: dict[str, Tensor],
    widen: Callable[[Tensor], Tensor],
    config: LatentConfig,
    statistics: SiteStatistics,
) -> dict[str, Tensor]:
    """The query projection, whole or in two factors; a bias (and a norm) comes after both."""
    if config.q.opaque is not None:
        return {k: v for k, v in own.items() if k.startswith("q_proj.")}
    last = "q_proj" if config.q_lora_rank is None else "q_proj.q_b_proj"
    bias = {}
    if config.q.bias:
        bias[f"{last}.bias"] = widen(own["q_proj.bias"][:, None])[:, 0]
    if config.q_lora_rank is None:
        return {"q_proj.weight": widen(own["q_proj.weight"]), **bias}
    assert statistics.query_gram is not None
    values, vectors = torch.linalg.eigh(statistics.query_gram)
    basis = vectors[:, torch.argsort(values, descending=True)][:, : config.q_lora_rank]
    return {
        "q_proj.q_a_proj.weight": basis.t() @ _wide(own["q_proj.weight"]),
        "q_proj.q_b_proj.weight": widen(basis),
        **bias,
    }
