"""Which state tensors a converted model has in ONNX: names, shapes, order.

Layout letters: B batch, C capacity (rows of a state), G kv heads, d, e key and value widths,
r latent rank, R rotary width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from reattend.errors import NothingFoundError, RefusedError
from reattend.install.adapter import Adapter
from reattend.install.binding import Binding
from reattend.mixers.config import BlockConfig
from reattend.mixers.dense import DenseConfig
from reattend.mixers.latent_config import LatentConfig

KEEP_DENSE = "convert the rest too, with the rule `to: dense` (or use plan identity)"


@dataclass(frozen=True)
class StateTensor:
    """One fixed-capacity tensor: [B, C, width], or [B, heads, C, width] where `heads` > 0.

    `name` begins with the number of the head group, and a dot, where the layer has several.
    """

    layer: int
    name: str
    heads: int
    width: int

    @property
    def input(self) -> str:
        """Its name as graph input."""
        return f"state.{self.layer}.{self.name}"

    @property
    def output(self) -> str:
        """Its name as graph output."""
        return f"state_out.{self.layer}.{self.name}"

    @property
    def letters(self) -> list[str | int]:
        """Its shape for the manifest."""
        return ["B", self.heads, "C", self.width] if self.heads else ["B", "C", self.width]

    def shape(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Its shape for these sizes."""
        middle = (self.heads, capacity) if self.heads else (capacity,)
        return (batch, *middle, self.width)


@dataclass(frozen=True)
class GroupLayout:
    """A head group: the node it becomes and its two state tensors."""

    op: str
    first: StateTensor
    second: StateTensor

    @property
    def tensors(self) -> list[StateTensor]:
        """What crosses the graph's border; a rotary part of width 0 holds nothing and does not."""
        return [t for t in (self.first, self.second) if t.width]


@dataclass(frozen=True)
class LayerLayout:
    """One converted layer: its head groups, one where the layer is of one kind."""

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
            _check(path, mixer.config, module.binding)
        if layer in found:
            raise RefusedError(
                "two converted layers use one cache slot", where=f"{found[layer].path} and {path}"
            )
        names = [f"{i}." if len(mixers) > 1 else "" for i in range(len(mixers))]
        groups = [_describe(path, layer, m.config, n) for m, n in zip(mixers, names, strict=True)]
        found[layer] = LayerLayout(path, layer, tuple(groups))
    if not found:
        raise NothingFoundError(
            "the model has no converted attention layer, so there is nothing to lower",
            next_step='convert it first: convert(model, plan="identity") keeps it as it is',
        )
    return [found[layer] for layer in sorted(found)]


def _check(path: str, config: object, binding: Binding) -> None:
    if not isinstance(config, BlockConfig):
        raise RefusedError("this layer has no ONNX form yet", where=path)
    why = ""
    if config.cross:
        why = "it attends to another stream (cross-attention)"
    elif not binding.stepwise:
        why = "what the original module does besides attention needs the whole sequence"
    elif binding.cache is None:
        why = "it keeps no cache; only decoders that generate token by token are exported"
    elif config.core.pattern == "chunked":
        why = "chunked attention has no ONNX form yet"
    elif config.core.pattern == "opaque":
        why = "what it attends to is a mask of the model's own, which the ONNX graph does not make"
    elif config.core.sinks:
        why = "its logit sinks have no input in the ONNX node yet"
    elif config.alibi is not None or config.relative is not None or config.added is not None:
        why = "what it adds to its scores has no input in the ONNX node yet"
    if why:
        raise RefusedError("this layer cannot be exported to ONNX", where=path, why=why)


def _describe(path: str, layer: int, config: object, group: str) -> GroupLayout:
    if isinstance(config, LatentConfig):
        first = StateTensor(layer, f"{group}latent", 0, config.kv_lora_rank)
        second = StateTensor(layer, f"{group}rope", 0, config.qk_rope_head_dim)
        return GroupLayout("LatentAttention", first, second)
    if isinstance(config, DenseConfig):
        core = config.core
        first = StateTensor(layer, f"{group}key", core.kv_heads, core.qk_head_dim)
        second = StateTensor(layer, f"{group}value", core.kv_heads, core.v_head_dim)
        return GroupLayout("Attention", first, second)
    raise RefusedError(
        f"a layer of kind {type(config).__name__} has no ONNX form yet",
        where=path,
        next_step="keep it dense for this target (`to: dense`)",
    )
