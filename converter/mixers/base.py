"""The contract of a mixer: one attention block in our own terms.

A call runs in phases, so that a layer can hold several *head groups* of different kinds
(`reattend.mixers.mixed`) around one cache and one output projection: `project` new tokens, `store`
what is cached of them, `attend` to all rows, `join` the heads, then `o_proj`. A block of one kind
is one group.

Layout letters: B batch, N new tokens, M cached tokens, H query heads, D hidden, e value width, P
rotary pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from reattend.errors import ArgumentError
from reattend.mixers.config import Frozen
from reattend.mixers.selecting.memo import Memo

#: What a mixer caches of each token: two tensors [B, heads, N, width], widths may be 0.
Rows = tuple[Tensor, Tensor]
#: (heads, width) of each of the two.
RowShapes = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Context:
    """What a call says about its tokens.

    Attributes:
        mask: what the model passed for this layer's cache: None, [B, M] validity (nonzero:
            real), or [B, 1, N, M] bool (True: visible) or additive. It never holds a position
            bias that the mixer adds itself.
        rotation: the model's own cos and sin per pair, [B or 1, N, P] each.
        position_BN: positions in tokens, where the model passes them.
        fresh: the state was empty before this call: the new tokens are all there is.
        extras: further tensors of the call that the block's own steps read.
    """

    mask: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    position_BN: Tensor | None = None
    fresh: bool = False
    extras: tuple[Tensor, ...] = ()


class State(Protocol):
    """One layer's cache, as a mixer sees it."""

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append new rows ([B, heads, N, width] each) and return all rows to attend to."""

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
class GroupedState(State, Protocol):
    """A state that keeps what each head group of a layer caches apart."""

    def group(self, index: int) -> State:
        """The state of one group, by its place in `Mixer.head_groups`."""


class Kept(NamedTuple):
    """Rows that some heads may still see: keys [B, g, M, d] and values [B, g, M, e].

    `place_BM`: position of each row in its sequence, -1 for none; `query_place_BN`: of each query.
    `memo`: what the cache holds for a selector (`reattend.mixers.selecting.memo.Memo`).
    """

    keys: Tensor
    values: Tensor
    place_BM: Tensor
    query_place_BN: Tensor
    memo: Memo | None = None


@runtime_checkable
class FreshState(State, Protocol):
    """Knows, without asking the device, whether the last `update` found it empty."""

    fresh: bool


class Mixer(nn.Module, ABC):
    """An attention block. `kind` names it in checkpoints, `config` describes it fully.

    Subclasses set `o_proj` (an `nn.Identity` where the block has no projection) and write
    `project` and `attend`. What passes between the phases is the subclass' own.
    """

    kind: ClassVar[str]
    config: Frozen
    o_proj: nn.Module

    def forward(
        self, x_BND: Tensor, ctx: Context, state: State | None = None, memory_BMD: Any = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, out_features], or joined heads where the block has no projection."""
        stored = state.stored() if self.cross and isinstance(state, MemoryState) else None
        if self.cross and stored is None and memory_BMD is None:
            raise ArgumentError(
                "a cross-attention block was called without encoder states",
                next_step="pass the encoder's output, or a cache that was filled with it",
            )
        if stored is not None:
            query, _ = self.project(x_BND, None, ctx, state)
            rows = self.unpack(stored)
        else:
            source = x_BND if memory_BMD is None else memory_BMD
            query, new = self.project(x_BND, source, ctx, state)
            rows = new if state is None else self.store(new, state)
        span = state.span() if state is not None else None
        if isinstance(state, FreshState) and state.fresh:
            ctx = replace(ctx, fresh=True)
        heads = self.attend(query, rows, ctx, span)
        y: Tensor = self.o_proj(self.join(heads, x_BND))
        return y

    @abstractmethod
    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """What `attend` reads of the new tokens, and their `Rows`.

        Args:
            x_BND: where queries come from.
            source_BMD: where keys and values come from; None: they are stored, the second is None.
            ctx: of this call.
            state: before anything is stored; only `seen` may be asked.
        """

    def store(self, new: Any, state: State) -> Any:
        """Append the new rows and return all rows to attend to.

        A mixer that keeps more than rows overrides this; as a head group it then needs a
        `GroupedState`.
        """
        return state.update(*new)

    def unpack(self, stored: Rows) -> Any:
        """All rows, from the two tensors a cache holds for this layer."""
        return stored

    @abstractmethod
    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Any:
        """Every head's output [B, H, N, e]; `span` is `State.span`."""

    def join(self, heads: Any, x_BND: Tensor) -> Tensor:
        """[B, H, N, e] -> [B, N, H e]: what `o_proj` reads."""
        joined: Tensor = heads.transpose(1, 2).flatten(2)
        return joined

    def described(self) -> dict[str, Any]:
        """What a checkpoint stores; `kinds.build_mixer` reads it back."""
        return {"kind": self.kind, "config": self.config.model_dump(mode="json")}

    @property
    def head_groups(self) -> Sequence[Mixer]:
        """The groups of heads, each a mixer; a block of one kind is its own only group."""
        return (self,)

    @property
    def reads(self) -> str:
        """Path of the block that this one reads from beside its inputs; "": none."""
        return ""

    def connect(self, other: Mixer) -> None:  # noqa: B027  (most blocks read no other)
        """Take what is read of the block at `reads`, once all mixers are in place."""

    def let_go(self) -> None:  # noqa: B027
        """Its gradient has been taken: what others read of it must not lead there again."""

    @property
    def query_heads(self) -> int:
        """H, over all groups."""
        config: Any = self.config
        return int(config.core.heads)

    @property
    def joined_width(self) -> int:
        """H e: what `join` gives."""
        config: Any = self.config
        return int(config.core.heads * config.core.v_head_dim)

    @property
    def keeps(self) -> bool:
        """Whether its state is a `KeepingState`: it chooses which rows stay."""
        return False

    @property
    def holds(self) -> bool:
        """Whether its state is a `HoldingState`: it keeps something of constant size."""
        return False

    @property
    def depends_on_calls(self) -> str:
        """What makes results depend on how a text is cut into calls, by design; "": nothing."""
        found = [group.depends_on_calls for group in self.head_groups if group is not self]
        return ", ".join(dict.fromkeys(word for word in found if word))

    @property
    def decodes_apart(self) -> bool:
        """Whether tokens that come one by one read fewer keys, by design, than in one pass."""
        return any(group.decodes_apart for group in self.head_groups if group is not self)

    @property
    def cross(self) -> bool:
        """Whether keys and values come from another stream."""
        return bool(getattr(self.config, "cross", False))

    @property
    @abstractmethod
    def row_shapes(self) -> RowShapes:
        """Heads and width of the two tensors this mixer caches per token."""

    @property
    def cache_per_token(self) -> int:
        """Numbers this mixer caches per token."""
        return sum(heads * width for heads, width in self.row_shapes)

    def fresh(self) -> Iterator[nn.Parameter]:
        """Weights that hold nothing of the original's at the start, and have far to go."""
        yield from ()

    def score_bias(self, n: int, m: int, offset: int) -> Tensor | None:
        """What the block adds to its scores by itself [1, H, N, M]; None: nothing.

        `n` queries, of which `offset` tokens come before the first, and `m` keys.
        """
        return None

    @property
    def adds_bias(self) -> bool:
        """Whether `score_bias` is not None."""
        return False
