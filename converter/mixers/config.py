"""The frozen, serialisable description of a mixer: what `config.json` stores for a site."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Frozen(BaseModel):
    """Base: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(Frozen):
    """One operation: `name` is its value, `call` an aten operator or a word of the closed list."""

    name: str
    call: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}


class Weight(Frozen):
    """A tensor the program owns; integers are buffers, floats parameters of the model's dtype."""

    shape: tuple[int, ...]
    dtype: str
    trained: bool = True


class Program(Frozen):
    """`output` computed from `inputs` and `weights` by `steps`, in order (`reattend.program`)."""

    inputs: tuple[str, ...]
    weights: dict[str, Weight] = {}
    steps: tuple[Step, ...]
    output: str


class NormConfig(Frozen):
    """`scope="head"`: over each head's width; `"full"`: over the whole stream."""

    kind: Literal["rms", "layer"]
    scope: Literal["head", "full"]
    eps: float
    gain: bool = True
    gain_offset: float = 0.0
    bias: bool = False
    after_rotary: bool = False


class OpaqueConfig(Frozen):
    """Stands where a projection does: a program from the source to [B, N, p], then row `rows[i]`
    of its p numbers as number i. One token's numbers depend on that token alone. `extras`: which of
    `Context.extras` the program takes after the source. `regroups`: what it makes are not one for
    each token it is given.
    """

    program: Program
    rows: tuple[int, ...]
    extras: tuple[int, ...] = ()
    regroups: bool = False


class GrowthConfig(Frozen):
    """Times 1 + beta log(1 + floor((position + offset) / period)), positions in tokens."""

    beta: float
    offset: int
    period: int
    smooth: bool = False


class StreamConfig(Frozen):
    """One of q, k, v after its projection; `opaque` in place of a linear one.

    `handed`: finished keys or values of another block, which is the one that caches them.
    """

    bias: bool = False
    opaque: OpaqueConfig | None = None
    norm: NormConfig | None = None
    scale: float = 1.0
    growth: GrowthConfig | None = None
    handed: bool = False


class RotaryConfig(Frozen):
    """The normal form rotates dimension i with i + pairs, i < pairs; the rest pass.

    `inv_freq` in radians per token, one per pair; cos and sin are multiplied by `scaling`.
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0

    @property
    def pairs(self) -> int:
        """Rotated pairs per head."""
        return len(self.inv_freq)


class RelativeConfig(Frozen):
    """A learned bias per head and distance: `buckets` is the table row of each distance -L..L.

    Distances are key - query, in tokens; those further than L take the row of L. `rows` of the
    table, at least one more than the largest bucket.
    """

    buckets: tuple[int, ...]
    rows: int

    @model_validator(mode="after")
    def _fits(self) -> RelativeConfig:
        if len(self.buckets) % 2 == 0 or not all(0 <= b < self.rows for b in self.buckets):
            raise ValueError("buckets must be an odd number of rows of the table")
        return self


class GateConfig(Frozen):
    """The joined heads times act(gate projection of the hidden state).

    `per_head`: one number per head, else one per head and dimension.
    """

    act: Literal["sigmoid", "silu", "tanh", "relu", "identity"]
    per_head: bool
    bias: bool = False


class AddedConfig(Frozen):
    """A program from the hidden state and extras to what is added to the scores, [.., H, N, M].

    It hides too, and knows the tokens of one call only. `heads`: its head of each of ours.
    """

    program: Program
    heads: tuple[int, ...]
    extras: tuple[int, ...] = ()


class JoinConfig(Frozen):
    """A program from `y` [B, H, N, e] (heads in the order `heads` of the normal form's) and the
    hidden state `x` to what the output projection reads [B, N, width].
    """

    program: Program
    heads: tuple[int, ...]
    width: int


class CoreConfig(Frozen):
    """Scores and pattern; query head h reads key/value head h // (heads // kv_heads).

    `sinks`: every head has one logit more, of no key, that takes part in its softmax. `opaque`: the
    model's own 4-D mask is the pattern; a call without one follows `unmasked`, and is an error
    where that is empty.
    """

    heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    scale: float
    softcap: float = 0.0
    pattern: Literal["full", "causal", "sliding", "chunked", "opaque"] = "causal"
    window: int = 0
    chunk: int = 0
    sinks: bool = False
    unmasked: Literal["", "full", "causal"] = ""

    @property
    def causal(self) -> bool:
        """Whether later keys are hidden."""
        return self.pattern != "full"


class BlockConfig(Frozen):
    """What every mixer of a site shares: the block's outside and its scores.

    `alibi`: for each head the number added to its scores per token of key position.
    """

    hidden_size: int
    memory_size: int
    q: StreamConfig
    k: StreamConfig
    v: StreamConfig
    rotary: RotaryConfig | None
    core: CoreConfig
    out_features: int | None
    out_bias: bool = False
    relative: RelativeConfig | None = None
    alibi: tuple[float, ...] | None = None
    added: AddedConfig | None = None
    gate: GateConfig | None = None
    join: JoinConfig | None = None

    @property
    def cross(self) -> bool:
        """Whether keys come from another stream (`memory_size` > 0)."""
        return self.memory_size > 0

    @property
    def cache_per_token(self) -> int:
        """Numbers the original block caches per token."""
        widths = ((self.k, self.core.qk_head_dim), (self.v, self.core.v_head_dim))
        return self.core.kv_heads * sum(width for stream, width in widths if not stream.handed)
