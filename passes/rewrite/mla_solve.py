"""From statistics to the mixer of one block: select, compress, absorb. All in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.mixers.config import StreamConfig
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.latent import LatentAttention
from reattend.mixers.latent_config import LatentConfig, has_own_query
from reattend.passes.rewrite.mla_latent import (
    Latent,
    LatentChoice,
    fold_turn,
    output_metric,
    plain_metric,
    weighted_pca,
)
from reattend.passes.rewrite.mla_moments import key_moment, latent_moment
from reattend.passes.rewrite.mla_norm import steadied
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.passes.rewrite.mla_phase import stand_in
from reattend.passes.rewrite.mla_rotary import RotaryChoice, select_real
from reattend.passes.rewrite.mla_select import select
from reattend.passes.rewrite.mla_sizes import Sizes, centred, folds_values
from reattend.passes.rewrite.mla_weights import latent_weights
from reattend.statistics import SiteStatistics


@dataclass(frozen=True)
class Solved:
    """What does not depend on the rank: the rotated rows, the latent's directions, the turn."""

    rotary: RotaryChoice
    latent: Latent
    turn_Hdd: Tensor


def solve(
    dense: DenseAttention,
    statistics: SiteStatistics,
    options: MlaOptions,
    sizes: Sizes,
) -> Solved:
    """Every choice for R and fold of `sizes`."""
    config = dense.config
    moment = key_moment(dense, statistics, options.mixing == "balanced")
    rope = sizes.qk_rope_head_dim
    phase = stand_in(config, statistics, options.phase)
    if options.published:
        rotary = select_real(config, moment, rope, sizes.fold)
    else:
        rotary = select(config, moment, statistics, phase, options, rope)
    turn_Hdd = phase.turn(config)
    by_cost = options.latent == "output"
    if by_cost:
        metric = output_metric(dense, rotary, statistics, turn_Hdd)
    else:
        metric = plain_metric(rotary, config.core.kv_heads * config.core.v_head_dim)
    moment_y, mean_y = latent_moment(dense, statistics, options)
    latent = weighted_pca(moment_y, mean_y, rotary, metric, options.ratio, by_cost)
    return Solved(rotary, fold_turn(dense, latent, turn_Hdd), turn_Hdd)


def assemble(
    dense: DenseAttention,
    statistics: SiteStatistics,
    options: MlaOptions,
    sizes: Sizes,
    solved: Solved,
    ballast: bool = True,
) -> tuple[LatentAttention, LatentChoice]:
    """The mixer of rank r, in the source dtype; `ballast`: where a norm is to be steadied."""
    rank = sizes.kv_lora_rank
    if ballast and options.latent_norm == "rms" and rank > 1:
        latent = steadied(solved.latent.cut(rank - 1), statistics)
    else:
        latent = solved.latent.cut(rank)
    with torch.device("meta"):
        mixer = LatentAttention(mixer_config(dense.config, sizes, options, solved.rotary.columns))
    state = latent_weights(dense, solved.rotary, latent, mixer.config, statistics, solved.turn_Hdd)
    dtype, device = dense.k_proj.weight.dtype, dense.k_proj.weight.device
    mixer.load_state_dict(
        {k: v.to(device, dtype).contiguous() for k, v in state.items()}, strict=True, assign=True
    )
    for parameter in mixer.parameters():
        parameter.requires_grad_(True)
    return mixer.eval(), latent


def mixer_config(
    config: DenseConfig, sizes: Sizes, options: MlaOptions, columns: tuple[int, ...]
) -> LatentConfig:
    """The mixer's description; key and value scales are folded into weights."""
    folds = folds_values(config)
    normed = has_own_query(config)
    data = config.model_dump(exclude={"kind"})
    data["k"] = StreamConfig(bias=config.k.bias and normed, norm=config.k.norm).model_dump()
    data["v"] = StreamConfig().model_dump()
    shifted = config.v.bias or centred(config, sizes, options)
    data["out_bias"] = config.out_bias or (folds and shifted)
    return LatentConfig(
        **data,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_rope_head_dim=sizes.qk_rope_head_dim,
        rope_columns=columns,
        q_lora_rank=options.q_lora_rank,
        latent_norm=options.latent_norm,
        value_bias=shifted and not folds,
        rope_key_bias=config.k.bias and not normed and sizes.qk_rope_head_dim > 0,
        key_bias=config.k.bias and not normed and config.core.sinks,
    )
