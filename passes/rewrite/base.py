"""A conversion: what replaces a block, when that is legal, and what it costs.

One file per conversion in this folder. Third parties add theirs by the entry point group
`reattend.conversions` (CONTRIBUTING.md shows how).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from reattend.mixers.base import Mixer
from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.passes.base import Refusal
from reattend.statistics import Need, SiteStatistics

Exactness = Literal["exact", "bounded", "learned"]


@dataclass(frozen=True)
class Cost:
    """Per site. `cache`: numbers cached per token; `flops_per_token`: multiply-adds x 2 for one
    new token against `context` cached ones; `parameters` of the block, `kept` of them the original
    block's own tensors, which take no memory of their own.
    """

    cache: int
    parameters: int
    flops_per_token: int
    context: int = 4096
    kept: int = 0


@dataclass
class Subject:
    """A site whose sizes are chosen from statistics, together with others."""

    path: str
    dense: DenseAttention
    statistics: SiteStatistics
    options: Any


#: Runs that one step of training through `Measure.trial` takes as long as.
TRAINING_TRIALS = 5
#: The divergence on the next rows, differentiable.
Gap = Callable[[], Tensor]


@dataclass
class Answered:
    """One row whose second half repeats pieces of its first, and what the model says of that half.

    Attributes:
        ids_N: the row.
        place_K: positions in its second half, whose next token is asked for.
        logits_KV: of the model with its sites converted, with gradients.
        own_K: the original's most likely next tokens there.
    """

    ids_N: Tensor
    place_K: Tensor
    logits_KV: Tensor
    own_K: Tensor

    @property
    def loss(self) -> Tensor:
        """Cross-entropy on the original's own answers, nats per token."""
        return cross_entropy(self.logits_KV.float(), self.own_K)


class Measure(Protocol):
    """What the model loses by a change. Its unit is the same for all sites; only ratios count."""

    def __call__(self, path: str, mixer: Mixer) -> float | None:
        """Divergence of the model's output if only this site is converted; None: unknown."""
        ...

    def trial(self, mixers: Mapping[str, Mixer]) -> AbstractContextManager[Gap] | None:
        """The model with these sites converted, to be trained; None: it cannot be run so."""
        ...

    def answers(
        self, mixers: Mapping[str, Mixer], length: int, rows: int
    ) -> AbstractContextManager[Iterator[Answered]] | None:
        """At most `rows` rows of `length` tokens, run one by one through the model with these
        sites converted; None: it cannot be run so, or is no language model.
        """
        ...

    @property
    def length(self) -> int:
        """Tokens of the calibration rows."""
        ...


class Conversion(ABC):
    """Base class; `Options` are the plan's YAML keys."""

    name: ClassVar[str]
    Options: ClassVar[type[Frozen]]
    needs: ClassVar[frozenset[Need]] = frozenset()
    #: takes blocks that read another block's keys and values, or hand their own on
    shared: ClassVar[bool] = False
    #: blocks of one rule depend on one another: `join` and `build_together` see them together
    joins: ClassVar[bool] = False
    #: what it builds has linear layers, which `calibrate.lora_rank` can adapt
    adapts: ClassVar[bool] = True

    @abstractmethod
    def check(self, config: DenseConfig, options: Any) -> Refusal | None:
        """Why this block cannot take these options, or None. Reads no weight."""

    @abstractmethod
    def build(self, dense: DenseAttention, statistics: Any, options: Any) -> Built:
        """The mixer that replaces `dense`, and the evidence of what was lost."""

    def check_within(self, config: DenseConfig, options: Any, longest: int) -> Refusal | None:
        """Why these options make no sense in a model that reads at most `longest` tokens, or None.

        Asked after `check` found nothing.
        """
        return None

    def check_tokens(self, config: DenseConfig, options: Any, tokens: int) -> Refusal | None:
        """Why these options do not fit a block that always reads so many tokens, or None.

        Asked after `check` found nothing.
        """
        return None

    def wants(self, config: DenseConfig, options: Any) -> frozenset[Need]:
        """The statistics that `build` and `allocate` will read."""
        return self.needs

    def outcome(self, config: DenseConfig, options: Any) -> Frozen | None:
        """The description of the mixer that `build` will make; None where statistics decide it."""
        return None

    def for_layer(self, options: Any, layer: int, layers: int) -> Any:
        """The options of one layer of a stack, or a Refusal; for options that list layers."""
        return options

    def join(self, members: Sequence[tuple[str, DenseConfig, Any]]) -> list[Any]:
        """For conversions that `joins`: of every site of a rule the options, or a Refusal.

        Sites whose options then have an equal `group` are built together.

        Args:
            members: path, block and options, in the order of the model.
        """
        return [options for _, _, options in members]

    def build_together(self, subjects: Sequence[Subject]) -> dict[str, Built]:
        """`build` of sites that depend on one another, by path."""
        return {s.path: self.build(s.dense, s.statistics, s.options) for s in subjects}

    def undecided(self, options: Any) -> bool:
        """Whether `allocate` has something to choose."""
        return False

    def together(self, options: Any) -> str:
        """Sites of one rule for which this is equal are given to `allocate` together."""
        found: str = options.model_dump_json()
        return found

    def decodes_apart(self, options: Any) -> bool:
        """`Mixer.decodes_apart` of what is built; quality is then measured token by token too."""
        return False

    def trials(self, configs: Sequence[DenseConfig], options: Any) -> int:
        """Runs of the model on a few rows that `allocate` takes for blocks that share options.

        A step of training counts `TRAINING_TRIALS`.
        """
        return len(configs)

    def solves(self, options: Any) -> int:
        """How often `build` and `allocate` solve for a site's second moments, as a whole."""
        return 20 if self.undecided(options) else 1

    def learns(self, options: Any) -> bool:
        """Whether `allocate` takes gradients through the model."""
        return False

    def training(self, config: DenseConfig, options: Any, length: int) -> tuple[float, float]:
        """Floating-point operations and bytes of what `build` trains, on texts of this length."""
        return 0.0, 0.0

    def rehearsal(self, batch: dict[str, Any], options: Any) -> dict[str, Any]:
        """The calibration rows on which `Measure` compares, changed to ask what matters here."""
        return batch

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """Final options of sites that share options, once there are statistics."""
        return [site.options for site in sites]

    def instead(self, options: Any) -> Conversion | None:
        """The conversion, without options, that `allocate` chose instead of this; None: none."""
        return None

    @abstractmethod
    def exact_setting(self, config: DenseConfig) -> Frozen:
        """Options under which the converted block equals the original."""

    @abstractmethod
    def cost(self, config: DenseConfig, options: Any) -> Cost:
        """What the converted block will cost, before any weight moves."""


@dataclass
class Built:
    """A new mixer and what is known about it.

    `energy` (descending, sums to 1): share of calibration energy per kept and discarded
    component; `evidence`: numbers for the report.
    """

    mixer: Mixer
    exactness: Exactness
    evidence: dict[str, Any]


def regrouped(config: DenseConfig) -> Refusal | None:
    """Why a block is refused whose queries or keys are not one for each of its tokens."""
    for name, stream in (("queries", config.q), ("keys", config.k)):
        if stream.opaque is not None and stream.opaque.regroups:
            return Refusal(f"{name} are not one for each token: the model's own steps regroup them")
    return None


def has_own_steps(config: DenseConfig) -> bool:
    """Whether a gate, or the model's own steps, hold weights beside the four projections."""
    opaque = any(s.opaque is not None for s in (config.q, config.k, config.v))
    return opaque or any(x is not None for x in (config.gate, config.join, config.added))


def dense_cost(config: DenseConfig, context: int = 4096) -> Cost:
    """The original block's cost."""
    c = config.core
    memory = config.memory_size or config.hidden_size
    rows = c.heads * c.qk_head_dim
    kv = c.kv_heads * (c.qk_head_dim + c.v_head_dim)
    out = c.heads * c.v_head_dim * (config.out_features or 0)
    parameters = rows * config.hidden_size + kv * memory + out
    parameters += (rows if config.q.bias else 0) + (config.out_features or 0) * config.out_bias
    parameters += c.kv_heads * (c.qk_head_dim * config.k.bias + c.v_head_dim * config.v.bias)
    parameters += config.relative.rows * c.heads if config.relative else 0
    if has_own_steps(config):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in DenseAttention(config).parameters())
    attention = c.heads * (c.qk_head_dim + c.v_head_dim) * context
    return Cost(config.cache_per_token, parameters, 2 * (parameters + attention), context)
