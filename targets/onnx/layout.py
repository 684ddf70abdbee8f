"""Which state tensors a converted model has in ONNX: names, shapes, order.

Layout letters: B batch, C capacity (rows of a state), G kv heads, d, e key and value widths,
r latent rank, R rotary width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from reattend.errors import NothingFoundError, RefusedError
from reattend.install.adapter import Adapter
from reattend.mixers.config import BlockConfig
from reattend.mixers.dense import DenseConfig
from reattend.mixers.echo import EchoConfig
from reattend.mixers.flowing_config import FlowingConfig
from reattend.mixers.latent_config import LatentConfig
from reattend.mixers.linear_config import LinearConfig
from reattend.mixers.pooled import PooledConfig
from reattend.mixers.recurrent_config import RecurrentConfig
from reattend.mixers.routed_config import RoutedConfig
from reattend.mixers.selective_config import SelectiveConfig
from reattend.mixers.sparse_config import HeadClass, SparseConfig
from reattend.targets.onnx.gated_linear_body import GATED
from reattend.targets.onnx.linear_body import LINEAR
from reattend.targets.onnx.refusals import STAY_DENSE, check_block
from reattend.targets.onnx.routed_body import FEW, NAME
from reattend.targets.onnx.sparse_form import SparseForm
from reattend.targets.onnx.sparse_layout import sparse_form

KEEP_DENSE = "convert the rest too, with the rule `to: dense` (or use plan identity)"


@dataclass(frozen=True)
class StateTensor:
    """One fixed-capacity tensor: [B, rows, width], or [B, heads, rows, width] where `heads` > 0.

    It has `rows` rows and `growing` more for every `block` tokens of the session's capacity C.

    Attributes:
        name: begins with the number of the node, and a dot, where the layer has several.
        rows: whatever the capacity is; 0: none, and `growing` is 1.
        block: tokens.
        per_block: `growing`, where there are rows of both kinds.
        ring: token t stands in row t mod its rows.
    """

    layer: int
    name: str
    heads: int
    width: int
    rows: int = 0
    block: int = 1
    per_block: int = 0
    ring: bool = False

    @property
    def growing(self) -> int:
        """Rows for every `block` tokens."""
        return self.per_block or int(not self.rows)

    @property
    def input(self) -> str:
        """Its name as graph input."""
        return f"state.{self.layer}.{self.name}"

    @property
    def output(self) -> str:
        """Its name as graph output."""
        return f"state_out.{self.layer}.{self.name}"

    @property
    def numbers(self) -> int:
        """Numbers in a row of it, over all heads."""
        return max(self.heads, 1) * self.width

    @property
    def letters(self) -> list[str | int]:
        """Its shape for the manifest."""
        each = f"{self.growing}C" if self.growing > 1 else "C"
        grown = f"{each}/{self.block}" if self.block > 1 else each
        whole = f"{grown}+{self.rows}" if self.rows else grown
        rows: str | int = whole if self.growing else self.rows
        return ["B", self.heads, rows, self.width] if self.heads else ["B", rows, self.width]

    def shape(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Its shape for these sizes."""
        rows = self.rows + self.growing * -(-capacity // self.block)
        middle = (self.heads, rows) if self.heads else (rows,)
        return (batch, *middle, self.width)


@dataclass(frozen=True)
class GroupLayout:
    """A node: a head group, or a class of heads of a sparse one, and its state tensors.

    Attributes:
        op: the node.
        beside: another one whose output is added to it; '' for none.
        first, second: the state; more: what chooses keys keeps beside it, or sums of older keys.
        part: the number of the head group in its layer.
        sparse, pattern: of a class of sparse heads: what it becomes, and what it sees, in words.
        saves: what the file saves by the node, for the manifest.
    """

    op: str
    first: StateTensor
    second: StateTensor | None
    part: int = 0
    sparse: SparseForm | None = None
    pattern: str = ""
    more: tuple[StateTensor, ...] = ()
    saves: str = ""
    beside: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes of the group."""
        return (self.op, self.beside) if self.beside else (self.op,)

    @property
    def tensors(self) -> list[StateTensor]:
        """What crosses the graph's border; a rotary part of width 0 holds nothing and does not."""
        return [t for t in (self.first, self.second, *self.more) if t is not None and t.width]


@dataclass(frozen=True)
class LayerLayout:
    """One converted layer: its nodes, one where the layer is of one kind and pattern."""

    path: str
    layer: int
    groups: tuple[GroupLayout, ...]

    @property
    def tensors(self) -> list[StateTensor]:
        """Those of all groups."""
        return [t for group in self.groups for t in group.tensors]


def layout(model: nn.Module) -> list[LayerLayout]:
    """The converted layers of a model, by layer index.

    Raises:
        NothingFoundError: the model has no converted layer.
        RefusedError: a layer of a kind that has no ONNX form, or two layers share a cache slot.
    """
    found: dict[int, LayerLayout] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Adapter):
            continue
        layer, mixers = module.binding.layer_idx, module.mixer.head_groups
        for mixer in mixers:
            check_block(path, mixer.config, module.binding)
        if layer in found:
            raise RefusedError(
                "two converted layers use one cache slot", where=f"{found[layer].path} and {path}"
            )
        nodes = [node for i, m in enumerate(mixers) for node in _nodes(path, i, m.config)]
        groups = [
            _describe(path, layer, node, f"{i}." if len(nodes) > 1 else "")
            for i, node in enumerate(nodes)
        ]
        found[layer] = LayerLayout(path, layer, tuple(groups))
    if not found:
        raise NothingFoundError(
            "the model has no converted attention layer, so there is nothing to lower",
            next_step='convert it first: convert(model, plan="identity") keeps it as it is',
        )
    return [found[layer] for layer in sorted(found)]


def check_dtype(layers: list[LayerLayout], dtype: str) -> None:
    """Refuse what is held in float32 in a file of another dtype.

    Raises:
        RefusedError: a layer with a state of sums.
    """
    for layer in layers:
        if dtype != "float32" and any(group.op in LINEAR for group in layer.groups):
            raise RefusedError(
                f"this layer cannot be exported to ONNX in {dtype}",
                where=layer.path,
                why="its sums over all older keys are held in float32, and all states of a file "
                "have one dtype",
                next_step='use dtype="float32"',
            )


class _Node(NamedTuple):
    """What one node computes: a head group, or one class of a sparse group's heads."""

    part: int
    config: object
    head_class: HeadClass | None = None


def _nodes(path: str, part: int, config: object) -> list[_Node]:
    if isinstance(config, SparseConfig):
        return [_Node(part, config, c) for c in config.classes]
    return [_Node(part, config)]


def _describe(path: str, layer: int, node: _Node, group: str) -> GroupLayout:
    part, config, head_class = node
    if isinstance(config, LatentConfig):
        first = StateTensor(layer, f"{group}latent", 0, config.kv_lora_rank)
        second = StateTensor(layer, f"{group}rope", 0, config.qk_rope_head_dim)
        return GroupLayout("LatentAttention", first, second, part)
    if isinstance(config, EchoConfig) and config.leader:
        value = StateTensor(layer, f"{group}value", config.core.kv_heads, config.core.v_head_dim)
        saves = f"memory: it keeps no keys, and reads those of {config.leader}"
        none = StateTensor(layer, f"{group}key", 0, 0)
        return GroupLayout("Attention", value, none, part, saves=saves)
    if isinstance(config, DenseConfig | PooledConfig | EchoConfig | RoutedConfig):
        op, saves = routed_form(config) if isinstance(config, RoutedConfig) else ("Attention", "")
        tensors = _key_value(layer, group, config, config.core.kv_heads, 0)
        return GroupLayout(op, *tensors, part, saves=saves)
    if isinstance(config, SparseConfig) and head_class is not None:
        form = sparse_form(path, config, head_class)
        heads = len(head_class.kv_heads)
        room = form.rows, form.block, form.per_block, form.ring
        first, second = _key_value(layer, group, config, heads, *room)
        words = head_class.pattern.words()
        more = tuple(
            StateTensor(layer, f"{group}{x.name}", heads, x.width, x.rows, x.block, x.per_block)
            for x in form.extra
        )
        return GroupLayout(form.op, first, second, part, form, words, more, form.saves)
    if isinstance(config, LinearConfig):
        return _linear(layer, group, part, config)
    raise RefusedError(
        f"a layer of kind {type(config).__name__} has no ONNX form yet",
        where=path,
        next_step=STAY_DENSE,
    )


def routed_form(config: RoutedConfig) -> tuple[str, str]:
    """The node of a block whose heads are chosen token by token, and what the file saves by it."""
    if config.top_k == config.routed:
        return "Attention", ""
    return NAME, (
        f"arithmetic: calls of more than {FEW} tokens compute {config.active:.0%} of the heads on "
        "average; shorter ones read and compute all, because leaving a head's rows unread would "
        "copy the others'"
    )


def _key_value(
    layer: int, group: str, config: BlockConfig, heads: int, *room: Any
) -> tuple[StateTensor, StateTensor]:
    """Both, with the same `rows`, `block`, `per_block` and `ring`."""
    core = config.core
    first = StateTensor(layer, f"{group}key", heads, core.qk_head_dim, *room)
    return first, StateTensor(layer, f"{group}value", heads, core.v_head_dim, *room)


def conv_tails(layer: int, group: str, config: SelectiveConfig) -> tuple[StateTensor, ...]:
    """Rows that a short convolution still sees."""
    core, d = config.core, config.core.qk_head_dim
    parts = ("key", core.kv_heads, d), ("value", core.kv_heads, core.v_head_dim)
    return tuple(
        StateTensor(layer, f"{group}conv_{name}", heads, width, config.held_rows)
        for name, heads, width in (*parts, ("query", core.heads, d))
    )


def _linear(layer: int, group: str, part: int, config: LinearConfig) -> GroupLayout:
    """A state of sums, and with a window a ring of rows, one more than a query may see."""
    state = StateTensor(layer, f"{group}state", config.state_heads, config.columns, config.features)
    saves = f"memory and reads: {config.held_after(config.held_rows)} numbers of a sequence"
    if isinstance(config, RecurrentConfig):
        op = "LinearAttention" if config.decay_by == "none" else GATED
        more = conv_tails(layer, group, config) if isinstance(config, SelectiveConfig) else ()
        if not config.window:
            return GroupLayout(op, state, None, part, more=more, saves=f"{saves}, always")
        rings = _key_value(layer, group, config, config.core.kv_heads, config.window)
        saves = f"{saves}, however long it is"
        return GroupLayout(op, state, None, part, more=rings, saves=saves, beside="SparseAttention")
    if not config.window:
        more = ()
        if isinstance(config, FlowingConfig):
            sums = StateTensor(layer, f"{group}flows", config.state_heads, config.features, 4)
            more = (sums, StateTensor(layer, f"{group}race", config.state_heads, 1, 1))
        return GroupLayout(
            "LinearAttention", state, None, part, more=more, saves=f"{saves}, always"
        )
    rings = _key_value(layer, group, config, config.core.kv_heads, config.held_rows + 1)
    saves = f"{saves}, and a row of keys and values, however long it is"
    return GroupLayout("WindowLinearAttention", *rings, part, more=(state,), saves=saves)
