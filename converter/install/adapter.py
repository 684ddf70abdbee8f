"""The adapter takes the owner's place in the model and calls the mixer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import ArgumentError, UnsupportedCacheError
from reattend.install.binding import Binding, TableRef, by_name, component, pack, read
from reattend.mixers.base import Context, Mixer


class StockState:
    """One layer of a transformers cache, seen as a mixer's state."""

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append on the token axis; returns everything the layer keeps."""
        keys, values = self.cache.update(first, second, self.layer_idx)
        return keys, values

    def seen(self) -> int:
        """Tokens so far."""
        return int(self.cache.get_seq_length(self.layer_idx))

    def span(self) -> tuple[Tensor, Tensor] | None:
        """A transformers cache is described by the model's mask."""
        return None


class Adapter(nn.Module):
    """Speaks the owner's signature outside and the mixer's inside."""

    def __init__(self, mixer: Mixer, binding: Binding, signature: inspect.Signature) -> None:
        super().__init__()
        self.mixer, self.binding, self.signature = mixer, binding, signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the module that stood here."""
        b = self.binding
        arguments = by_name(self.signature, args, kwargs)
        if arguments.get("output_attentions"):
            raise ArgumentError(
                "a converted layer does not form attention weights",
                where=f"{type(self.mixer).__name__} of layer {b.layer_idx}",
                next_step="call the model without output_attentions=True",
            )
        x = read(arguments, b.hidden)
        ctx = Context(
            mask=read(arguments, b.mask),
            rotation=self._rotation(arguments),
            position_BN=read(arguments, b.position),
        )
        y = self.mixer(x, ctx, self._state(arguments), read(arguments, b.memory))
        return pack(b.output, y, arguments)

    def _rotation(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        if self.binding.cos is None or self.binding.sin is None:
            return None
        cos, sin = _table(arguments, self.binding.cos), _table(arguments, self.binding.sin)
        return None if cos is None or sin is None else (cos, sin)

    def _state(self, arguments: dict[str, Any]) -> Any:
        cache = read(arguments, self.binding.cache)
        if cache is None:
            return None
        if hasattr(cache, "reattend_state"):
            return cache.reattend_state(self.binding.layer_idx)
        if self.binding.cache_part:
            cache = getattr(cache, self.binding.cache_part)
        if not hasattr(cache, "update"):
            raise UnsupportedCacheError(
                f"a converted layer was given a cache of type {type(cache).__name__}",
                next_step="pass a transformers Cache (DynamicCache, StaticCache) or none",
            )
        return StockState(cache, self.binding.layer_idx)


def _table(arguments: dict[str, Any], ref: TableRef) -> Tensor | None:
    leaf = read(arguments, ref.path)
    if leaf is None:
        return None
    values = component(leaf, ref.part)
    columns = torch.tensor(ref.columns, device=values.device)
    whole = ref.columns == tuple(range(len(ref.columns)))
    picked = values[..., : len(ref.columns)] if whole else values.index_select(-1, columns)
    return picked.reshape(-1, *picked.shape[-2:]) if picked.dim() != 3 else picked


def install(owner: nn.Module, mixer: Mixer, binding: Binding) -> Adapter:
    """An adapter for `owner`; its plain attributes (layer_idx, config ...) are carried over."""
    signature = inspect.signature(owner.forward)
    adapter = Adapter(mixer, binding, signature)
    own = {"training", "mixer", "binding", "signature"}
    for name, value in vars(owner).items():
        if not name.startswith("_") and name not in own:
            setattr(adapter, name, value)
    adapter.train(owner.training)
    return adapter


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Set `model.<path>` (a dotted path; list indices included)."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, name, new)
