"""The words of the compiler: what one attention block is, without its weights.

A block is three *streams* (query, key, value), each a source and ordered steps, a *core* that
mixes them, and a projection out. The order of steps is data, not a list of flags, because real
models differ in it. Layout letters: B batch, N query length, M key length, H query heads,
G key/value heads, D hidden, d head width, P rotary pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from reattend.mixers.config import Program

PatternKind = Literal["full", "causal", "sliding", "chunked", "opaque"]


@dataclass(frozen=True)
class Proj:
    """A row map of one linear layer.

    `rows[h * d + i]` is the output row of `weight` that becomes dimension i of head h, so fused
    and per-head interleaved layouts are the same case. `transposed`: stored as [in, out].
    """

    weight: str
    bias: str | None
    heads: int
    width: int
    rows: tuple[int, ...] = field(repr=False)
    transposed: bool = False


@dataclass(frozen=True)
class Norm:
    """Normalisation of each head (`scope="head"`) or of the whole stream (`"full"`)."""

    kind: Literal["rms", "layer"]
    scope: Literal["head", "full"]
    eps: float
    gain: str | None
    gain_offset: float = 0.0
    bias: str | None = None


@dataclass(frozen=True)
class Rotary:
    """Rotation of `pairs` of head dimensions by position x `inv_freq` (radians per token).

    `scaling` is the factor the model multiplies cos and sin with (yarn, longrope). `pairing`
    names the layout for people; the pairs decide.
    """

    pairs: tuple[tuple[int, int], ...] = field(repr=False)
    inv_freq: tuple[float, ...] = field(repr=False)
    pairing: Literal["half", "interleaved", "other"] = "half"
    scaling: float = 1.0

    @property
    def width(self) -> int:
        """Rotated dimensions per head."""
        return 2 * len(self.pairs)


@dataclass(frozen=True)
class Growth:
    """1 + beta log(1 + floor((position + offset) / period)), positions in tokens (Llama 4); or,
    `smooth`, 1 + beta log(max(1, (position + offset) / period)) (Inkling 2)."""

    beta: float
    offset: int
    period: int
    smooth: bool = False

    def at(self, position: int) -> float:
        """The factor."""
        if self.smooth:
            return 1 + self.beta * math.log(max(1.0, (position + self.offset) / self.period))
        return 1 + self.beta * math.log1p((position + self.offset) // self.period)


@dataclass(frozen=True)
class Scale:
    """Multiplication by a constant, for example OPT's scaled queries, and by position."""

    value: float
    growth: Growth | None = None


@dataclass(frozen=True)
class Opaque:
    """The model's own steps in place of a projection: a program from the source to [B, N, p].

    `rows[h * d + i]` is the number of p that becomes dimension i of head h; `sources`: the
    attribute that each weight of the program is; `extras`: which of the block's further inputs
    the program takes after the source. `regroups`: it makes another number of tokens than it is
    given, by pooling, windows, or tokens of another tensor beside.
    """

    program: Program = field(repr=False)
    sources: tuple[tuple[str, str], ...]
    heads: int
    width: int
    rows: tuple[int, ...] = field(repr=False)
    extras: tuple[int, ...] = ()
    regroups: bool = False
    bias: None = None

    @property
    def weight(self) -> str:
        """A stored tensor that identifies it."""
        return self.sources[0][1] if self.sources else ""


Step = Proj | Opaque | Norm | Rotary | Scale


@dataclass(frozen=True)
class Stream:
    """One of q, k, v: where it comes from and what happens on the way to the core.

    `source`: `hidden`, `encoder`, or `site:<path>` of the block whose keys or values it reads.
    """

    source: str
    steps: tuple[Step, ...]

    @property
    def site(self) -> str:
        """Path of the block whose keys or values these are; empty where they are its own."""
        return self.source.removeprefix("site:") if self.source.startswith("site:") else ""

    @property
    def proj(self) -> Proj | Opaque:
        """The projection, or what stands for it (one, and it comes first)."""
        step = self.steps[0]
        assert isinstance(step, Proj | Opaque)
        return step

    def first(self, kind: type) -> Step | None:
        """The first step of a kind, or None."""
        return next((s for s in self.steps if isinstance(s, kind)), None)

    def order(self) -> tuple[str, ...]:
        """Names of the steps in order, for messages."""
        return tuple(type(s).__name__.lower() for s in self.steps)


@dataclass(frozen=True)
class Pattern:
    """What a query may see, before padding: `window` and `chunk` in tokens.

    `sliding`: key j is visible to query i iff i - window < j <= i. `opaque`: whatever mask the
    model passes; `unmasked` is what the block was seen to do when it is passed none, if anything.
    """

    kind: PatternKind
    window: int = 0
    chunk: int = 0
    unmasked: Literal["", "full", "causal"] = ""

    @property
    def causal(self) -> bool:
        """Whether later keys are hidden."""
        return self.kind in ("causal", "sliding", "chunked")


@dataclass(frozen=True)
class RelativeBias:
    """A number per head and distance: row `buckets[L + key - query]` of `weight` [rows, heads].

    `buckets` covers distances -L..L in tokens; further ones take the row at the end.
    """

    weight: str
    rows: int
    buckets: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Alibi:
    """Every head adds `slopes[h]` x key position to its scores (in tokens, from any origin)."""

    slopes: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Added:
    """All that is added to the scores, hiding included, as the model computes it.

    A program from the hidden state and `extras` (as in `Opaque`) to [.., H or 1, N, M]. It knows
    the tokens of one call only, so such a block has no cache.
    """

    program: Program = field(repr=False)
    sources: tuple[tuple[str, str], ...]
    extras: tuple[int, ...] = ()


@dataclass(frozen=True)
class Core:
    """softmax(softcap(q k^T * scale) + bias + pattern | sinks) v.

    `sinks`: a weight with one logit per head that takes part in the softmax and has no value;
    empty: that logit is 0.
    """

    heads: int
    kv_heads: int
    kv_head_of: tuple[int, ...] = field(repr=False)
    qk_head_dim: int = 0
    v_head_dim: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    pattern: Pattern = Pattern("full")
    bias: RelativeBias | Alibi | Added | None = None
    sinks: str | None = None


@dataclass(frozen=True)
class Out:
    """The projection that leaves the block: `columns[h * d + i]` reads head h, dimension i."""

    weight: str
    bias: str | None
    features: int
    columns: tuple[int, ...] = field(repr=False)
    transposed: bool = False


@dataclass(frozen=True)
class Gate:
    """Every head's output times act(projection of the hidden state).

    `rows[h * e + i]` of `weight` belongs to head h, dimension i; `rows[h]` where `per_head`.
    """

    weight: str
    bias: str | None
    act: Literal["sigmoid", "silu", "tanh", "relu", "identity"]
    per_head: bool
    rows: tuple[int, ...] = field(repr=False)
    transposed: bool = False


@dataclass(frozen=True)
class Joined:
    """The model's own steps between core and output projection, as a program.

    From `y` [B, H, N, e] and the hidden state `x` to [B, N, width]; `sources` as in `Opaque`.
    """

    program: Program = field(repr=False)
    sources: tuple[tuple[str, str], ...]
    width: int


@dataclass(frozen=True)
class AttentionSpec:
    """One attention block. `out` is None where its projection lives outside the block.

    `join`: what stands between the core and `out`; None: nothing. `whole`: the model's own steps
    mix tokens or count them, so all tokens of a sequence come in one call (there is no cache).
    """

    q: Stream
    k: Stream
    v: Stream
    core: Core
    out: Out | None
    join: Gate | Joined | None = None
    whole: bool = False

    @property
    def kind(self) -> str:
        """`self` or `cross`."""
        return "cross" if self.k.source == "encoder" else "self"

    @property
    def cache_per_token(self) -> int:
        """Numbers cached per token by the block as it is: its own keys and values, all kv heads."""
        widths = ((self.k, self.core.qk_head_dim), (self.v, self.core.v_head_dim))
        return self.core.kv_heads * sum(width for stream, width in widths if not stream.site)

    def summary(self) -> str:
        """One line for people."""
        from reattend.summary import summary

        return summary(self)
