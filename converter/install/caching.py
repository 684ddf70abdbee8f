"""Learn by running once which call argument is the cache and which layer of it a module uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from reattend.capture import Call, watch
from reattend.install.binding import bound, leaves, read
from reattend.install.pieces import BOTH, CacheAt
from reattend.running import evaluation


def watch_cache(model: nn.Module, paths: set[str], inputs: dict[str, Any]) -> dict[str, CacheAt]:
    """path -> where its cache is.

    The model runs once with a recording cache, or with the one it makes itself where it takes no
    other; modules that do not write to it are absent.
    """
    active: list[str] = []
    arguments: dict[str, dict[str, Any]] = {}
    found: dict[str, list[tuple[CacheAt, dict[str, Any]]]] = {}

    def record(caches: tuple[Any, ...], part: str | None, layer_idx: int) -> None:
        for owner in active:  # nested modules may both turn out to be the owner
            leaf = (p for p, v in leaves(arguments[owner]) if any(v is c for c in caches))
            path = next(leaf, None)
            if path is not None:
                seen = CacheAt(path, part, int(layer_idx))
                found.setdefault(owner, []).append((seen, arguments[owner]))

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
            record((cache,), self.part, layer_idx)
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values

    def enter(m: nn.Module, args: Any, kwargs: Any, path: str) -> None:
        active.append(path)
        arguments[path] = bound(m, args, kwargs)

    def leave(*_: Any) -> None:
        active.pop()

    cache = _empty_cache(model, Recording)
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(
            module.register_forward_pre_hook(partial(enter, path=path), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(leave, always_call=True))
    refused = (TypeError, ValueError, AttributeError, RuntimeError)
    try:
        with evaluation(model), torch.no_grad():
            try:
                model(**{**inputs, "use_cache": True, "past_key_values": cache})
            except refused:
                found.clear()
                with _recorded(lambda own, idx: record((own,), None, idx)):
                    model(**{**inputs, "use_cache": True})
    except refused:
        return {}  # it is converted without a cache
    finally:
        for handle in handles:
            handle.remove()
    return {path: _placed(calls) for path, calls in found.items()}


@contextmanager
def _recorded(record: Callable[[Any, int], None]) -> Iterator[None]:
    """Tell of every write to a cache, whoever made it."""
    update = Cache.update

    def told(self: Any, keys: Tensor, values: Tensor, layer_idx: int, *a: Any, **k: Any) -> Any:
        record(self, layer_idx)
        return update(self, keys, values, layer_idx, *a, **k)

    Cache.update = told  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Cache.update = update  # type: ignore[method-assign]


def _placed(calls: list[tuple[CacheAt, dict[str, Any]]]) -> CacheAt:
    """The layer that a module writes to, from its calls: one, or one counted from an argument."""
    first, arguments = calls[0]
    if len({at.part for at, _ in calls}) > 1:
        return first._replace(part=BOTH)
    if all(at.layer_idx == first.layer_idx for at, _ in calls):
        return first
    for path, leaf in leaves(arguments):
        if type(leaf) is int:
            numbers = [read(given, path) for _, given in calls]
            bases = {
                at.layer_idx - n if type(n) is int else None
                for (at, _), n in zip(calls, numbers, strict=True)
            }
            if len(bases) == 1 and None not in bases:
                return first._replace(layer_idx=first.layer_idx - leaf, shift=path)
    return first._replace(shift=())


def _empty_cache(model: nn.Module, kind: Any) -> Any:
    """A cache of this class for the model; one for each part of an encoder-decoder."""
    config: Any = model.config
    if not getattr(config, "is_encoder_decoder", False):
        return kind(config=config.get_text_config(decoder=True))
    own, cross = kind(), kind()
    own.part, cross.part = "self_attention_cache", "cross_attention_cache"
    return EncoderDecoderCache(own, cross)


@dataclass
class Steps:
    """Calls of some modules: for a whole sequence, and piece by piece from a cache."""

    whole: dict[str, Call]
    pieces: list[tuple[int, int, dict[str, Call]]]


def watch_steps(model: nn.Module, paths: set[str], inputs: dict[str, Any]) -> Steps | None:
    """Run the model once as a whole and once in three pieces, the last of one token.

    Args:
        model: a transformers model.
        paths: modules to watch.
        inputs: example arguments, `use_cache` False.

    Returns:
        The calls; None where the model cannot be run piece by piece on such inputs.
    """
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    known = {f"{prefix}input_ids", f"{prefix}attention_mask", "use_cache"}
    if not prefix and not set(inputs) <= known:
        return None
    ids, mask = inputs[f"{prefix}input_ids"], inputs.get(f"{prefix}attention_mask")
    length = ids.shape[1]
    cache = _empty_cache(model, DynamicCache)
    steps = Steps(watch(model, paths, inputs), [])
    for start, end in ((0, length // 2), (length // 2, length - 1), (length - 1, length)):
        given = {**inputs, "use_cache": True, "past_key_values": cache}
        given[f"{prefix}input_ids"] = ids[:, start:end]
        if mask is not None:
            given[f"{prefix}attention_mask"] = mask[:, :end]
        try:
            steps.pieces.append((start, end, watch(model, paths, given)))
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
            return None
    return steps
