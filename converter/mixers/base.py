"""The contract of a mixer: one attention block in our own terms.

Layout letters: B batch, N new tokens, M cached tokens, D hidden, P rotary pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from reattend.errors import ModelError
from reattend.mixers.config import Frozen


@dataclass(frozen=True)
class Context:
    """What a call says about its tokens.

    Attributes:
        mask: what the model passed for this layer's cache: None, [B, M] validity (nonzero:
            real), or [B, 1, N, M] bool (True: visible) or additive. It never holds a position
            bias that the mixer adds itself.
        rotation: the model's own cos and sin per pair, [B or 1, N, P] each.
        position_BN: positions in tokens, where the model passes them.
    """

    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    position_BN: Tensor | None = None


class State(Protocol):
    """One layer's cache, as a mixer sees it."""

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append new rows ([B, heads, N, width] each) and return all rows to attend to."""
        ...

    def seen(self) -> int:
        """Tokens this layer has seen before the call."""
        ...

    def span(self) -> tuple[Tensor, Tensor] | None:
        """(kv_start_B, kv_len_B) of a fixed-capacity state after `update`; None: use the mask."""
        ...


@runtime_checkable
class MemoryState(State, Protocol):
    """The cache of a cross-attention layer: filled once per prompt, then only read."""

    def stored(self) -> tuple[Tensor, Tensor] | None:
        """All rows, if the encoder's states were projected before."""
        ...


@runtime_checkable
class FreshState(State, Protocol):
    """A state that knows, without asking the device, whether the last `update` found it empty."""

    fresh: bool


class Mixer(nn.Module, ABC):
    """An attention block. `kind` names it in checkpoints, `config` describes it fully."""

    kind: ClassVar[str]
    config: Frozen

    @abstractmethod
    def forward(
        self, x_BND: Tensor, ctx: Context, state: State | None = None, memory_BMD: Any = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, out_features], or joined heads where the block has no projection."""

    def described(self) -> dict[str, Any]:
        """What a checkpoint stores; `build_mixer` reads it back."""
        return {"kind": self.kind, "config": self.config.model_dump(mode="json")}

    @property
    @abstractmethod
    def cache_per_token(self) -> int:
        """Numbers this mixer caches per token."""


def build_mixer(kind: str, config: dict[str, Any]) -> Mixer:
    """An empty mixer from what a checkpoint stores.

    Args:
        kind: `dense`, `latent`, or the name of an entry point of group `reattend.mixers` that a
            third party's package registers for its `Mixer` subclass.
        config: fields of that class's config; third parties implement `from_config(mapping)`.

    Raises:
        ModelError: nobody here knows the kind.
    """
    from reattend.mixers.dense import DenseAttention, DenseConfig
    from reattend.mixers.latent import LatentAttention, LatentConfig

    if kind == DenseAttention.kind:
        return DenseAttention(DenseConfig.model_validate(config))
    if kind == LatentAttention.kind:
        return LatentAttention(LatentConfig.model_validate(config))
    for entry in entry_points(group="reattend.mixers", name=kind):
        made: Mixer = entry.load().from_config(config)
        return made
    raise ModelError(
        f"this checkpoint has a mixer of kind {kind!r}, which is not installed here",
        next_step="update reattend, or install the package that added this conversion",
    )
