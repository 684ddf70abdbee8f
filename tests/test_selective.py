"""`decay: selective` against transformers' own Mamba-2 layer, and its cache against one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_models import decoder
from mla_blocks import HIDDEN, config, dense
from pydantic import ValidationError
from test_linear import inputs
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from reattend import convert, load
from reattend.mixers.base import Context
from reattend.mixers.kinds import build_mixer
from reattend.passes.rewrite.linear_hybrid import HybridOptions, ToHybrid
from reattend.plan import Plan

OPTIONS = HybridOptions(**Plan.load("mamba2").rules[0].options.model_dump())


def selective(block: Any) -> Any:
    """All new weights shaken."""
    own = {name for name, _ in block.named_parameters()}
    mixer = ToHybrid().build(block, None, OPTIONS).mixer
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name not in own:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


class _HeadNorm(nn.Module):
    """Theirs is over all heads; Mamba-in-Llama's, and so ours, over each."""

    def __init__(self, weight_He: Tensor) -> None:
        super().__init__()
        self.weight_He = weight_He

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y.double() * nn.functional.silu(z.double())).unflatten(-1, self.weight_He.shape)
        return (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight_He).flatten(-2)


def theirs(mixer: Any) -> Mamba2Mixer:
    """transformers' layer with the weights of ours; every head is a group of its own."""
    c, each = mixer.config.core, mixer.config.core.heads // mixer.config.core.kv_heads
    size: dict[str, Any] = {
        "hidden_size": c.heads * c.v_head_dim, "num_heads": c.heads, "head_dim": c.v_head_dim,
        "state_size": c.qk_head_dim, "n_groups": c.heads, "conv_kernel": 4,
        "expand": 1, "chunk_size": 8, "use_bias": False,
    }  # fmt: skip
    made = Mamba2Mixer(Mamba2Config(**size), layer_idx=0)
    made.in_proj = nn.Linear(HIDDEN, made.in_proj.out_features, bias=False)
    made.out_proj = nn.Linear(made.out_proj.in_features, HIDDEN, bias=False)
    made = made.double().eval()

    def repeated(x: Tensor) -> Tensor:
        return x.unflatten(0, (c.kv_heads, -1)).repeat_interleave(each, 0).flatten(0, 1)

    k, v = repeated(mixer.k_proj.weight), repeated(mixer.v_proj.weight)
    convs = [mixer.conv_v, mixer.conv_k, mixer.conv_q]
    taps = [x.weight_hdw.flatten(0, 1) for x in convs]
    bias = [x.bias_hd.flatten() for x in convs]
    taps, bias = ([repeated(x[0]), repeated(x[1]), x[2]] for x in (taps, bias))
    with torch.no_grad():
        parts = [mixer.z_proj.weight, v, k, mixer.q_proj.weight, mixer.dt_proj.weight]
        made.in_proj.weight.copy_(torch.cat(parts))
        made.conv1d.weight.copy_(torch.cat(taps)[:, None])
        made.conv1d.bias.copy_(torch.cat(bias))
        made.dt_bias.copy_(mixer.dt_proj.bias)
        made.A_log.copy_(mixer.a_log_H)
        made.D.copy_(mixer.skip_H)
        made.norm = _HeadNorm(mixer.norm_He)
        made.out_proj.weight.copy_(mixer.o_proj.weight)
    return made


def test_it_is_transformers_layer_with_the_blocks_projections() -> None:
    mixer = selective(dense(config()))
    x, _ = inputs(29, (0,))
    with torch.no_grad():
        want, got = theirs(mixer)(x), mixer(x, Context())
    # theirs computes in float32
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_stored_description_builds_the_same_mixer() -> None:
    mixer = selective(dense(config()))
    again = build_mixer(**mixer.described()).double()
    again.load_state_dict(mixer.state_dict())
    x, _ = inputs(11)
    assert torch.equal(again(x, Context()), mixer(x, Context()))


def test_the_start_is_the_published_one_and_costs_what_it_says() -> None:
    mixer = ToHybrid().build(dense(config()), None, OPTIONS).mixer
    dt = nn.functional.softplus(mixer.dt_proj.bias)
    assert bool(((dt >= 1e-3) & (dt <= 1e-1)).all())
    decay = mixer.a_log_H.detach().exp()
    assert bool(((decay >= 1) & (decay <= 16)).all()) and float(decay.std()) > 0.5
    x = torch.randn(1, 4, 7, 8, dtype=torch.float64)
    assert torch.equal(mixer.conv_q(x), nn.functional.silu(x))
    cost = ToHybrid().cost(config(), OPTIONS)
    assert cost.parameters == sum(p.numel() for p in mixer.parameters())
    with pytest.raises(ValidationError, match="needs rope: window-only"):
        HybridOptions(**{**OPTIONS.model_dump(), "rope": "before"})


def test_a_model_learns_generates_and_is_saved(tmp_path: Any) -> None:
    calibrate = {
        "tokens": 2000, "stages": ["layerwise"], "seq_len": 40, "batch_size": 4, "lr": 1e-2,
    }  # fmt: skip
    result = convert(
        decoder("llama", layers=2, groups=2),
        plan={"extends": "mamba2", "calibrate": calibrate},
        data=torch.randint(3, 97, (12, 40)),
        out=tmp_path / "m",
    )
    loss = result.report.calibration.stages[-1].loss
    assert loss[-1][1] < 0.9 * loss[0][1]
    model = load(tmp_path / "m")
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    run = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **run), model.generate(ids, use_cache=False, **run))
