"""Diffusion models of another library, tiny and random: every block is found, and equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reattend import convert, find_attention

diffusers: Any = pytest.importorskip("diffusers")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def unet() -> tuple[Any, dict[str, Any], dict[str, Any], int]:
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    inputs = {
        "sample": drawn(2, 4, 16, 16), "timestep": torch.tensor([5, 9]),
        "encoder_hidden_states": drawn(2, 7, 24), "return_dict": False,
    }  # fmt: skip
    return model, inputs, {"encoder_hidden_states": drawn(2, 5, 24)}, 8


def dit() -> tuple[Any, dict[str, Any], dict[str, Any], int]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {
        "hidden_states": drawn(3, 4, 8, 8), "timestep": torch.tensor([5, 9, 2]),
        "class_labels": torch.tensor([1, 2, 3]), "return_dict": False,
    }  # fmt: skip
    return model, inputs, {"timestep": torch.tensor([1, 4, 7])}, 2


def test_blocks_of_one_and_of_two_streams_convert() -> None:
    """Flux (tiny): text and image attend together; the last block's text is read by nothing.

    A block of two streams projects each by itself, and joins them before the core.
    """
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": drawn(2, 16, 4), "encoder_hidden_states": drawn(2, 7, 32),
        "pooled_projections": drawn(2, 32), "timestep": torch.tensor([0.5, 0.7]),
        "img_ids": drawn(16, 3).round(), "txt_ids": torch.zeros(7, 3), "return_dict": False,
    }  # fmt: skip
    result = convert(model, plan="identity", inputs=inputs)
    done = [s.path for s in result.report.sites if s.action == "converted"]
    single = [f"single_transformer_blocks.{i}.attn" for i in range(2)]
    assert sorted(done) == [*single, "transformer_blocks.0.attn"]
    change = {"encoder_hidden_states": drawn(2, 5, 32), "txt_ids": torch.zeros(5, 3)}
    for given in (inputs, inputs | change):
        with torch.no_grad():
            gap = result.model(**given)[0] - model(**given)[0]
        assert float(gap.abs().max()) <= 1e-5


@pytest.mark.parametrize("make", [pytest.param(unet, marks=pytest.mark.slow), dit])
def test_every_block_is_found_and_equal(make: Any) -> None:
    torch.manual_seed(0)
    model, inputs, change, count = make()
    model = model.eval()
    found = find_attention(model, inputs)
    assert not found.refused
    assert [s.owner for s in found.sites] == ["module"] * count
    converted = convert(model, plan="identity", inputs=inputs).model
    for given in (inputs, inputs | change):
        with torch.no_grad():
            gap = converted(**given)[0] - model(**given)[0]
        assert float(gap.abs().max()) <= 1e-5
