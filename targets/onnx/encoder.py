"""The module that is exported of a model without states: its own inputs in, its own outputs out.

Layout letters: B batch, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import (
    ArgumentError,
    CaptureError,
    NothingFoundError,
    ReattendError,
    RefusedError,
)
from reattend.inputs import is_hf, made_up
from reattend.install.adapter import Adapter
from reattend.install.binding import Binding
from reattend.mixers.dense import DenseConfig
from reattend.mixers.sparse_config import SparseConfig
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import Observed
from reattend.targets.onnx.encoder_mixer import Passes, WholeSparse, make_whole
from reattend.targets.onnx.manifest import PASS
from reattend.targets.onnx.refusals import scores_beside


def is_encoder(model: nn.Module) -> bool:
    """Whether a model's converted layers have no caches, and there are some."""
    found = [m.binding for m in model.modules() if isinstance(m, Adapter)]
    return bool(found) and all(binding.cache is None for binding in found)


def check_encoder(model: nn.Module) -> list[tuple[str, Adapter]]:
    """The converted layers of such a model.

    Raises:
        RefusedError: one of them has no ONNX form.
        NothingFoundError: there is none.
        ArgumentError: the model is not one of transformers with inputs of a known kind.
    """
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, Adapter)]
    if not layers:
        raise NothingFoundError("the model has no converted attention layer to lower")
    for path, layer in layers:
        check_encoder_block(path, layer.mixer.config, layer.binding)
    if not is_hf(model):
        raise ArgumentError(
            "only models of transformers can be exported to ONNX without an example",
            where=type(model).__name__,
            next_step="pass inputs={...}, an example: one pass is written in standard operators",
        )
    return layers


def check_encoder_block(path: str, config: object, binding: Binding) -> None:
    """Refuse a block that no node of a file without states computes.

    Raises:
        RefusedError: with the reason.
    """
    why = ""
    if not isinstance(config, DenseConfig | SparseConfig):
        why = "in a model without caches only dense and sparse layers have one"
    elif config.cross:
        why = "it attends to another stream (cross-attention)"
    elif config.core.pattern == "opaque":
        why = "what it attends to is a mask of the model's own, which no node takes"
    elif binding.hands:
        why = "it leaves keys and values for later blocks"
    else:
        why = scores_beside(config)
    if not why and isinstance(config, SparseConfig):
        why = next(filter(None, (_unknown(c.pattern) for c in config.classes)), "")
    if why:
        raise RefusedError(
            "this layer has no ONNX form as a node",
            where=path,
            why=why,
            next_step="pass inputs={...}, an example: one pass is written in standard operators",
        )


def _unknown(pattern: HeadPattern) -> str:
    """Why no node knows a pattern; empty where one does."""
    select = pattern.select
    if not isinstance(select, Observed):
        return ""
    if pattern.terms:
        return "no node knows select: observed beside other terms"
    if select.topp is not None or select.threshold is not None:
        return "no node knows select: observed with topp or threshold, only topk and ratio"
    return ""


class Encoder(nn.Module):
    """One call of a model; where heads read what an earlier pass saw, one pass over a text.

    Inputs: the model's own; then, if there are states, `PASS`, [1] each, and the states.

    Args:
        model: of transformers; its blocks become nodes, see `encoder_mixer.make_whole`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.states = model, make_whole(model)
        made = made_up(model)
        self.constants = {k: v for k, v in made.items() if not isinstance(v, Tensor)}
        self.own = {k: v for k, v in made.items() if isinstance(v, Tensor)}
        with torch.no_grad():
            try:
                found = list(leaves(self._called(list(self.example.values()))))
            except ReattendError:
                raise
            except Exception as error:
                raise CaptureError(
                    "the model cannot run on inputs that are made up for it",
                    where=type(model).__name__,
                    why=f"it was given {', '.join(self.own)}: {type(error).__name__}: {error}",
                    next_step="export the part of it that takes these inputs",
                ) from error
        self.output_names = [name for name, _ in found]
        self.output_names += [name.replace("state.", "state_out.", 1) for name in self.states]

    @property
    def example(self) -> dict[str, Tensor]:
        """Inputs of a first call by itself."""
        if not self.states:
            return self.own
        rows = len(next(iter(self.own.values())))
        told = {name: torch.zeros(1, dtype=torch.long) for name in PASS}
        states = {
            name: torch.zeros(rows, heads, 3, 5, dtype=torch.long)
            for name, heads in self.states.items()
        }
        return {**self.own, **told, **states}

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return list(self.example)

    def _called(self, given: list[Tensor]) -> Any:
        """The model's own result."""
        named = dict(zip(self.input_names, given, strict=True))
        if self.states:
            states = {name: named.pop(name) for name in self.states}
            number, passes, new_tokens = (named.pop(name) for name in PASS)
            around = Passes(number, passes, new_tokens, states)
            for module in self.model.modules():
                if isinstance(module, WholeSparse):
                    module.around = around
            self.around = around
        return self.model(**named, **self.constants, return_dict=True)

    def forward(self, given: list[Tensor]) -> tuple[Tensor, ...]:
        """Tensors of the result, then the states, in the order of `output_names`."""
        found = [value for _, value in leaves(self._called(given))]
        return (*found, *(self.around.written[name] for name in self.states))

    def dynamic(self, name: str) -> dict[int, Any]:
        """Which sizes of an input vary: rows, and tokens; images keep their size."""
        value, auto = self.example[name], torch.export.Dim.AUTO
        if name in PASS:
            return {}
        if name in self.states:
            return {0: auto, 2: auto, 3: auto}
        tokens = value.dim() == 2 and not value.is_floating_point()
        return {0: auto, 1: auto} if tokens and "pixel_values" not in self.own else {0: auto}


def leaves(result: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's result, named by their keys: `logits`, `hidden_states.0`."""
    if isinstance(result, Tensor):
        yield name or "output", result
        return
    parts = result.items() if isinstance(result, Mapping) else enumerate(result or ())
    for key, value in parts:
        if value is not None and not isinstance(value, str | int | float):
            yield from leaves(value, f"{name}.{key}" if name else str(key))
