"""Example inputs: made up for Hugging Face models, resized for probing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import ArgumentError

#: Example sizes: distinct primes, so that a batch is never mistaken for a length.
BATCH, LENGTH = 2, 23
#: height and width in pixels, where a model's config does not say
IMAGE = 64
#: rows and columns of patches, where the caller cuts images
_PATCHES = (4, 6)


def is_hf(model: nn.Module) -> bool:
    """Whether this is a transformers model (without importing transformers for others)."""
    return any(c.__module__ == "transformers.modeling_utils" for c in type(model).__mro__)


def made_up(model: nn.Module, batch: int = BATCH, length: int = LENGTH) -> dict[str, Any]:
    """Example keyword arguments of a transformers model.

    Args:
        model: a transformers model; its main input decides.
        batch, length: B and N of the made tensors.

    Raises:
        ArgumentError: the model's main input is of a kind nobody taught us to make.
    """
    config: Any = model.config
    text = config.get_text_config()
    known = inspect.signature(model.forward).parameters
    main = _main(model, known)
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", IMAGE)  # convolutions take any size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        if "spatial_shapes" in known:
            rows, columns = _PATCHES
            width = int(channels * vision.patch_size**2)
            pixels = torch.randn(batch, rows * columns, width, generator=generator)
            return _patches(pixels.to(device, next(model.parameters()).dtype))
        pixels = torch.randn(batch, channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    if main != "input_ids":
        raise ArgumentError(
            f"reattend cannot make example inputs for a model whose input is {main!r}",
            where=type(model).__name__,
            next_step="pass inputs={...}: a dict of example tensors for model(**inputs)",
        )
    vocabulary = int(text.vocab_size)
    low = min(8, vocabulary - 1)
    ids = torch.randint(low, vocabulary, (batch, length), generator=generator).to(device)
    made: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in known:
        made["attention_mask"] = torch.ones_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        decoder = torch.randint(low, vocabulary, (batch, length - 4), generator=generator)
        made["decoder_input_ids"] = decoder.to(device)
        if "decoder_attention_mask" in known:
            made["decoder_attention_mask"] = torch.ones_like(made["decoder_input_ids"])
    return without_cache(model, made)


def _main(model: nn.Module, known: Mapping[str, inspect.Parameter]) -> str:
    """The name of a model's main input; tokens or pixels where it calls them just `inputs`."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main in ("input_ids", "pixel_values"):
        return main
    return next((name for name in ("input_ids", "pixel_values") if name in known), main)


def _patches(pixels: Tensor) -> dict[str, Any]:
    """Images cut into patches by whoever calls the model [B, patches, values], and their places."""
    batch, count, _ = pixels.shape
    return {
        "pixel_values": pixels,
        "pixel_attention_mask": torch.ones(batch, count, dtype=torch.long, device=pixels.device),
        "spatial_shapes": torch.tensor([_PATCHES] * batch, device=pixels.device),
    }


def without_cache(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call with caching off, where the model knows caching."""
    parameters = inspect.signature(model.forward).parameters
    handed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in parameters or (handed_on and "past_key_values" in parameters):
        return {**inputs, "use_cache": False}
    return inputs


def resized(inputs: dict[str, Any], length: int, new_length: int) -> dict[str, Any]:
    """The same inputs at another length: axes of size `length` are tiled.

    Another sequence of tokens (a decoder's) keeps its distance in length, so that the two are
    never mistaken for each other.
    """
    return {name: _resized(value, length, new_length) for name, value in inputs.items()}


def _resized(value: Any, length: int, new_length: int) -> Any:
    """`resized` for one input, or for all that it holds."""
    if isinstance(value, dict):
        return resized(value, length, new_length)
    if type(value) in (list, tuple):
        return type(value)(_resized(item, length, new_length) for item in value)
    if not isinstance(value, Tensor):
        return value
    floats = value.is_floating_point() or value.dtype == torch.bool
    tokens = value.dim() == 2 and not floats
    for axis in range(value.dim()):
        size = value.shape[axis]
        if size == length or (tokens and axis and size > 1):
            wanted = max(2, new_length + size - length)
            index = torch.arange(wanted, device=value.device) % size
            value = value.index_select(axis, index)
    return value
