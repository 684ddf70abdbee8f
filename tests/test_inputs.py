"""Example inputs: made up by what a model's call is called with, resized whatever holds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reattend.inputs import made_up, resized
from reattend.unwieldy import symbolic_axes


class Model(nn.Module):
    """A model with a config, as transformers has them."""

    main_input_name = "inputs"

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3)
        self.config = SimpleNamespace(
            vocab_size=50, image_size=32, num_channels=3, patch_size=4, is_encoder_decoder=False
        )
        self.config.get_text_config = lambda: self.config


class Text(Model):
    def forward(self, inputs: Any = None, attention_mask: Any = None, input_ids: Any = None) -> Any:
        return inputs


class Image(Model):
    def forward(self, inputs: Any = None, pixel_values: Any = None) -> Any:
        return inputs


class Patches(Model):
    main_input_name = "pixel_values"

    def forward(
        self, pixel_values: Any, pixel_attention_mask: Any = None, spatial_shapes: Any = None
    ) -> Any:
        return pixel_values


def test_inputs_follow_the_names_of_the_call() -> None:
    assert {k: tuple(v.shape) for k, v in made_up(Text(), 3, 9).items()} == {
        "input_ids": (3, 9),
        "attention_mask": (3, 9),
    }
    assert made_up(Image(), 3)["pixel_values"].shape == (3, 3, 32, 32)
    cut = made_up(Patches(), 3)
    rows, columns = cut["spatial_shapes"][0].tolist()
    assert cut["pixel_values"].shape == (3, rows * columns, 3 * 4 * 4)
    assert bool(cut["pixel_attention_mask"].all())


def test_tensors_inside_of_other_inputs_are_resized_and_symbolic() -> None:
    pair = (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8))
    inputs = {"x": torch.randn(2, 7, 8), "states": {"full": pair}, "use_cache": False}
    longer = resized(inputs, 7, 11)
    assert longer["x"].shape == (2, 11, 8) and not longer["use_cache"]
    assert [t.shape for t in longer["states"]["full"]] == [(2, 4, 11, 8)] * 2
    axes = symbolic_axes(inputs["states"], images=True)
    assert type(axes["full"]) is tuple and all(set(a) == {0, 1, 2, 3} for a in axes["full"])
    assert isinstance(longer["states"]["full"][0], Tensor)
