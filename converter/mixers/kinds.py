"""Mixers by kind, as checkpoints name them, imported on first use."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from reattend.errors import ModelError
from reattend.mixers.base import Mixer

#: kind: where the mixer is, and where its description
_OWN = {
    "dense": ("dense:DenseAttention", "dense:DenseConfig"),
    "echo": ("echo:EchoAttention", "echo:EchoConfig"),
    "flowing": ("flowing:FlowingAttention", "flowing_config:FlowingConfig"),
    "latent": ("latent:LatentAttention", "latent_config:LatentConfig"),
    "linear": ("linear:LinearAttention", "linear_config:LinearConfig"),
    "mixed": ("mixed:MixedAttention", "mixed:MixedConfig"),
    "pooled": ("pooled:PooledAttention", "pooled:PooledConfig"),
    "recurrent": ("recurrent:RecurrentAttention", "recurrent_config:RecurrentConfig"),
    "routed": ("routed:RoutedAttention", "routed_config:RoutedConfig"),
    "selective": ("selective:SelectiveAttention", "selective_config:SelectiveConfig"),
    "sparse-linear": (
        "sparse_linear:SparseLinearAttention", "sparse_linear_config:SparseLinearConfig",
    ),
    "sparse": ("sparse:SparseAttention", "sparse_config:SparseConfig"),
}  # fmt: skip
GROUP = "reattend.mixers"


def build_mixer(kind: str, config: dict[str, Any]) -> Mixer:
    """An empty mixer from what a checkpoint stores.

    Args:
        kind: of a mixer of ours, or the name of an entry point of group `reattend.mixers` that a
            third party's package registers for its `Mixer` subclass.
        config: fields of that class's config; third parties implement `from_config(mapping)`.

    Raises:
        ModelError: nobody here knows the kind.
    """
    if kind in _OWN:
        mixer, described = (_found(home) for home in _OWN[kind])
        built: Mixer = mixer(described.model_validate(config))
        return built
    for entry in entry_points(group=GROUP, name=kind):
        made: Mixer = entry.load().from_config(config)
        return made
    raise ModelError(
        f"this checkpoint has a mixer of kind {kind!r}, which is not installed here",
        next_step="update reattend, or install the package that added this conversion",
    )


def _found(home: str) -> Any:
    module, _, name = home.partition(":")
    return getattr(import_module(f"reattend.mixers.{module}"), name)
