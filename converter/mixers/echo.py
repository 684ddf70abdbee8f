"""EchoAttention: a block that attends where an earlier one did, with values of its own.

EchoAtt (arXiv 2409.14595) hands attention matrices from a leader to its followers. Here the leader
hands on its queries and keys, from which every kernel forms the same weights again: a follower has
neither query nor key projection, and caches values alone. What it reads is what the leader attended
to in the same pass of the model, cached keys included.

Layout letters: B batch, N new tokens, M cached tokens, H query heads, G KV heads, d, e widths.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from reattend.errors import ArgumentError, ModelError
from reattend.mixers.base import Context, Mixer, Rows, RowShapes, State
from reattend.mixers.block import project
from reattend.mixers.config import BlockConfig
from reattend.mixers.dense import DenseAttention, stream


class EchoConfig(BlockConfig):
    """The block, and where its queries and keys come from.

    `leader`: path of the site that makes them; empty for a leader. `followers`: how many blocks
    read a leader's.
    """

    kind: Literal["echo"] = "echo"
    leader: str = ""
    followers: int = 0


class Relay:
    """Queries and keys of one pass of the model, from a leader to its followers.

    They are let go once every follower has read them. A copy starts empty.
    """

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None
        self.left = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Relay:
        return Relay()

    def put(self, q_BHNd: Tensor, k_BGMd: Tensor, times: int) -> None:
        """Hold them for so many readers."""
        self.held, self.left = (q_BHNd, k_BGMd), times

    def cut(self) -> None:
        """Take what is held off its graph: the leader's gradient has been taken already."""
        if self.held is not None:
            self.held = (self.held[0].detach(), self.held[1].detach())

    def take(self, v_BGMe: Tensor, new: int) -> tuple[Tensor, Tensor]:
        """What a follower reads.

        Args:
            v_BGMe: all its values.
            new: its queries, N.

        Raises:
            ArgumentError: the leader did not run before in the same pass.
        """
        held = self.held
        fits = held is not None and (held[0].shape[0], held[0].shape[2]) == (v_BGMe.shape[0], new)
        if held is None or not fits or held[1].shape[2] != v_BGMe.shape[2]:
            raise ArgumentError(
                "a block that attends where an earlier one did was run without it",
                why="its leader's queries and keys of the same tokens are not there",
                next_step="run the whole model, without gradient checkpointing",
            )
        self.left -= 1
        if self.left == 0:
            self.held = None
        return held


class EchoAttention(DenseAttention):
    """A leader, which is the block itself, or a follower."""

    kind = "echo"
    config: EchoConfig  # type: ignore[assignment]

    def __init__(self, config: EchoConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.begin(config)

    def begin(self, config: EchoConfig) -> None:
        """Drop what a follower does not need."""
        self.config = config
        self.relay = Relay()
        if config.leader:
            self.q_proj = self.k_proj = nn.Identity()
            self.q_norm = self.k_norm = None

    @property
    def reads(self) -> str:
        """See `Mixer.reads`."""
        return self.config.leader

    def connect(self, other: Mixer) -> None:
        """See `Mixer.connect`."""
        if not isinstance(other, EchoAttention) or not other.config.followers:
            raise ModelError(
                f"the block at {self.config.leader} hands no queries and keys on",
                next_step="convert or load all blocks of a group together",
            )
        self.relay = other.relay

    def let_go(self) -> None:
        """See `Mixer.let_go`."""
        self.relay.cut()

    @property
    def row_shapes(self) -> RowShapes:
        """A follower caches values alone."""
        if not self.config.leader:
            return super().row_shapes
        core = self.config.core
        return (core.kv_heads, core.v_head_dim), (core.kv_heads, 0)

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Rows | None]:
        """As a DenseAttention; a follower's rows are values, and nothing in place of keys."""
        if not self.config.leader or source_BMD is None:
            return super().project(x_BND, source_BMD, ctx, state)
        c = self.config
        offset = state.seen() if state is not None and self.adds_bias else 0
        made = project(self.v_proj, source_BMD, ctx)
        v = stream(made, c.core.kv_heads, c.v, self.v_norm, None, 0)
        return (x_BND.shape[1], offset), (v, v[..., :0])

    def attend(
        self, query: Any, rows: Rows, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        if not self.config.leader:
            if self.config.followers:
                self.relay.put(query[0], rows[0], self.config.followers)
            return super().attend(query, rows, ctx, span)
        (new, offset), v = query, rows[0]
        q, k = self.relay.take(v, new)
        return super().attend((q, offset, None), (k, v), ctx, span)
