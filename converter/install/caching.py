"""Learn by running once which call argument is the cache and which layer of it a module uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from reattend.capture import evaluation
from reattend.install.binding import Path, bound, leaves


def watch_cache(
    model: nn.Module, paths: set[str], inputs: dict[str, Any]
) -> dict[str, tuple[Path, str | None, int]]:
    """path -> (leaf that holds the cache, part of an encoder-decoder cache, layer index).

    The model runs once with a recording cache; modules that do not write to it are absent.
    """
    active: list[str] = []
    arguments: dict[str, dict[str, Any]] = {}
    found: dict[str, tuple[Path, str | None, int]] = {}

    class Recording(DynamicCache):
        part: str | None = None

        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            if active and active[-1] not in found:
                path = next((p for p, v in leaves(arguments[active[-1]]) if v is cache), None)
                if path is not None:
                    found[active[-1]] = (path, self.part, int(layer_idx))
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values

    config: Any = model.config
    cache: Any = Recording(config=config.get_text_config(decoder=True))
    if getattr(config, "is_encoder_decoder", False):
        own, cross = Recording(), Recording()
        own.part, cross.part = "self_attention_cache", "cross_attention_cache"
        cache = EncoderDecoderCache(own, cross)

    handles = []
    for path in paths:
        module = model.get_submodule(path)

        def enter(m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            active.append(path)
            arguments[path] = bound(m, args, kwargs)

        def leave(*_: Any) -> None:
            active.pop()

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with evaluation(model), torch.no_grad():
            model(**{**inputs, "use_cache": True, "past_key_values": cache})
    except (TypeError, ValueError, AttributeError):
        return {}  # the model takes no such cache: it is converted without one
    finally:
        for handle in handles:
            handle.remove()
    return found
