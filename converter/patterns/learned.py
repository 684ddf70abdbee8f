"""Selectors that `finder: gate` trains by the attention that a block itself pays.

Layout letters: d key head width.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from pydantic import Field, model_validator

from reattend.mixers.config import CoreConfig
from reattend.patterns.selector import Budgeted


class Gate(Budgeted):
    """Blocks by a trained score: SeerAttention (Gao et al., arXiv 2410.13276), per query.

    A block of keys is summarised by a linear map of its largest, smallest and mean keys, the
    queries that read a KV head by a linear map of all of them; the product ranks the blocks, for
    those queries together, as in the paper's form for decoding (SeerAttention-R). A query's own
    block is always read, takes no part in the ranking, and counts. `finder: gate` trains the maps.

    Attributes:
        block: tokens per block. Units of the budget are blocks, the own one included.
        gate_dim: width of both maps.
    """

    kind: Literal["gate"]
    block: int = Field(default=64, gt=0)
    gate_dim: int = Field(default=128, gt=0)

    @property
    def trained(self) -> bool:
        """See the class."""
        return True

    def lesson(self, length: int, core: CoreConfig) -> tuple[float, float]:
        """Maps and products with summaries; queries and shares of blocks."""
        queries, blocks = core.qk_head_dim * core.heads / core.kv_heads, length / self.block
        return self.gate_dim * (queries + blocks), queries + blocks

    def parameters(self, core: CoreConfig) -> int:
        """Of one KV head's maps."""
        group = core.heads // core.kv_heads
        return self.gate_dim * core.qk_head_dim * (group + 3)

    def reads(self, length: int) -> int:
        """Blocks of the budget, whole."""
        return min(length, self.units(-(-length // self.block)) * self.block)

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the blocks."""
        return self._quarter_of_blocks(length, self.block)

    def stored(self, core: CoreConfig) -> float:
        """Summaries."""
        return self.gate_dim / self.block

    def work(self, length: int, core: CoreConfig) -> float:
        """Per query head, its share of the group's map and of the products with summaries."""
        group = core.heads // core.kv_heads
        summaries = core.qk_head_dim * 3 / self.block + length / self.block
        return self.gate_dim * (core.qk_head_dim + summaries / group)

    def misfit(self, core: CoreConfig) -> str | None:
        """Its cache holds blocks that are complete."""
        return None if core.causal else "select: gate needs a causal block"


class Segments(Budgeted):
    """Tokens by the chunk they are in, where chunks end as a trained predictor says: DHSA.

    Dynamic hierarchical sparse attention, Xiong et al., arXiv 2510.24606. Every KV head cuts the
    text where later queries look at one side of a gap and not at the other, which a small network
    predicts from the keys on both sides (`finder: gate` trains it). A query ranks the chunks by the
    product with their mean key x sqrt(tokens), reads whole chunks in that order, and of the last
    one as many tokens as the budget leaves, the nearest ones.

    Attributes:
        window: tokens on either side of a gap that the predictor sees.
        apart: no two ends are nearer; the likelier one counts.
        theta: a gap is an end where the attention to its sides is predicted to differ by more.
        longest: tokens of a chunk at most: it ends at every multiple in any case.
        local: last tokens that every query reads. Tokens behind the last known end are read too;
            both count.
        hidden: width of the predictor's layers.
    """

    kind: Literal["segments"]
    window: int = Field(default=4, gt=0)
    apart: int = Field(default=8, ge=0)
    theta: float = Field(default=1.1, ge=1.0)
    longest: int = Field(default=128, gt=0)
    local: int = Field(default=128, gt=0)
    hidden: int = Field(default=64, gt=0)

    @model_validator(mode="after")
    def _counts_tokens(self) -> Segments:
        if self.topp is not None or self.threshold is not None:
            raise ValueError("the budget of segments is a number of tokens: topk or ratio")
        return self

    @property
    def trained(self) -> bool:
        """See the class."""
        return True

    @property
    def delay(self) -> int:
        """Tokens after which a gap is known to be an end, or not."""
        return self.window + self.apart

    def lesson(self, length: int, core: CoreConfig) -> tuple[float, float]:
        """Both windows of a gap; a key and a target."""
        return self._predicting(core), core.qk_head_dim + 1

    def _predicting(self, core: CoreConfig) -> float:
        """Multiply-adds for one gap."""
        windows = 2 * core.qk_head_dim * (self.window + self.hidden)
        return windows + self.hidden * (4 * self.hidden + 2)

    def parameters(self, core: CoreConfig) -> int:
        """Of one KV head's predictor."""
        d, w = core.qk_head_dim, self.hidden
        return d * (self.window + 1) + w * (d + 1) + w * (4 * w + 2) + w + 1

    def reads(self, length: int) -> int:
        """Tokens of the budget, or those that are read in any case."""
        return min(length, max(self.units(length), self.local, self.longest + self.delay))

    def covers(self, length: int) -> bool:
        """Chunks may end before they are as long as they may be."""
        return max(self.units(length), self.local) >= length

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the tokens, half of them the last ones."""
        return {"local": min(self.local, max(1, length // 8)), **self._quarter(length)}

    def stored(self, core: CoreConfig) -> float:
        """What is predicted of a gap."""
        return 1.0

    def work(self, length: int, core: CoreConfig) -> float:
        """Per query head: its share of chunks' sums and of predicting; products with chunks."""
        d = core.qk_head_dim
        shared = (length * d / 2 + self._predicting(core)) / (core.heads // core.kv_heads)
        return shared + d * length / (self.apart + 1)

    def misfit(self, core: CoreConfig) -> str | None:
        """Chunks are of what came before."""
        return None if core.causal else "select: segments needs a causal block"


class Values(Budgeted):
    """Tokens by a trained score of their values, whatever the query: dynamic mask attention (DMA).

    Shi et al., arXiv 2508.02124: gain x softplus(rate · the values of all KV heads), for every KV
    head; a query reads the best of the tokens before it, and itself. `finder: gate` trains both.
    """

    kind: Literal["values"]

    @model_validator(mode="after")
    def _counts_tokens(self) -> Values:
        if self.topp is not None or self.threshold is not None:
            raise ValueError("the budget of values is a number of tokens: topk or ratio")
        return self

    @property
    def trained(self) -> bool:
        """See the class."""
        return True

    def lesson(self, length: int, core: CoreConfig) -> tuple[float, float]:
        """The score, and its sums over what each query sees; values."""
        return core.kv_heads * core.v_head_dim + length, core.v_head_dim + 1

    def parameters(self, core: CoreConfig) -> int:
        """Rate and gain."""
        return core.kv_heads * core.v_head_dim + 1

    def reads(self, length: int) -> int:
        """Tokens of the budget."""
        return self.units(length)

    def stored(self, core: CoreConfig) -> float:
        """Scores."""
        return 1.0

    def work(self, length: int, core: CoreConfig) -> float:
        """Per query head, its share of the new token's score."""
        return core.kv_heads * core.v_head_dim * core.kv_heads / core.heads

    def misfit(self, core: CoreConfig) -> str | None:
        """A token is compared with those before it."""
        return None if core.causal else "select: values needs a causal block"


class LowRank(Budgeted):
    """Tokens of an image by a low-rank guess of the attention: Sparsifiner.

    Wei et al., arXiv 2303.13755: softmax(q' (k' down)) up, with narrower queries and keys, the keys
    summed into a few columns, and those spread over the image again; all four are trained, for
    images of one size. Text sees everything, and is chosen like any other token.

    Attributes:
        reduce_channels: what the width of queries and keys is divided by.
        reduce_tokens: what the number of keys is divided by.
        shape, text_before, text_after: where the image lies, as `reattend.patterns.grids.Grid`; an
            open shape is taken from a plan's `image_grid`.
    """

    kind: Literal["low-rank"]
    reduce_channels: int = Field(default=2, gt=0)
    reduce_tokens: int = Field(default=8, gt=0)
    shape: tuple[int, ...] = Field(default=(), max_length=3)
    text_before: int = Field(default=0, ge=0)
    text_after: int | None = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _counts_tokens(self) -> LowRank:
        if self.topp is not None or self.threshold is not None:
            raise ValueError("the budget of low-rank is a number of tokens: topk or ratio")
        return self

    @property
    def trained(self) -> bool:
        """See the class."""
        return True

    @property
    def tokens(self) -> int:
        """Of the image and its text."""
        return self.text_before + prod(self.shape) + (self.text_after or 0)

    def width(self, core: CoreConfig) -> int:
        """Of narrow queries and keys."""
        return max(1, core.qk_head_dim // self.reduce_channels)

    @property
    def columns(self) -> int:
        """That keys are summed into."""
        return max(1, self.tokens // self.reduce_tokens)

    def lesson(self, length: int, core: CoreConfig) -> tuple[float, float]:
        """The guess and what it is compared with, which is formed anew; queries and keys."""
        group, d = core.heads // core.kv_heads, core.qk_head_dim
        return self.work(length, core) * group, (group + 1) * d

    def parameters(self, core: CoreConfig) -> int:
        """Of one KV head."""
        narrow = 2 * (core.qk_head_dim + 1) * self.width(core)
        return narrow + 2 * self.tokens * self.columns

    def reads(self, length: int) -> int:
        """The share of so many that the budget and the text are of the image and its text."""
        text = self.text_before + (self.text_after or 0)
        most = min(self.tokens, self.units(self.tokens) + text)
        return round(length * most / max(1, self.tokens))

    def sized(self, length: int) -> dict[str, Any]:
        """A quarter of the image."""
        return self._quarter(self.tokens)

    def work(self, length: int, core: CoreConfig) -> float:
        """Per query: narrowing it and a key, the key's sums, products with columns, and back."""
        c = self.width(core)
        return c * (2 * core.qk_head_dim + 2 * self.columns) + self.columns * length

    def misfit(self, core: CoreConfig) -> str | None:
        """It guesses a whole image."""
        if core.causal:
            return "select: low-rank is for blocks that are not causal"
        if not self.shape or self.text_after is None:
            return "select: low-rank has no size: give image_grid, for example [14, 14]"
        return None
