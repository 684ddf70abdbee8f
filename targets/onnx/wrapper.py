"""The module that is exported: tensors in, tensors out, no cache objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import ArgumentError
from reattend.targets.onnx.layout import LayerLayout, StateTensor
from reattend.targets.onnx.state import FixedCache

TOKENS = ("input_ids", "attention_mask", "position_ids")


class Step(nn.Module):
    """N new tokens after the T - N of the state; prefill is T = N.

    Inputs: `input_ids` [B, N], `attention_mask` [B, T] (1 real, 0 left padding), `position_ids`
    [B, N], all int64, then the state tensors with capacity C >= T. Outputs: `logits` [B, N, V],
    then the states with the new rows written at T - N.
    """

    def __init__(self, model: nn.Module, layers: list[LayerLayout]) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    @property
    def state_tensors(self) -> list[StateTensor]:
        """State tensors in the order of the arguments."""
        return [t for layer in self.layers for t in layer.tensors]

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [*TOKENS, *(t.input for t in self.state_tensors)]

    @property
    def output_names(self) -> list[str]:
        """Names of the graph's outputs."""
        return ["logits", *(t.output for t in self.state_tensors)]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """See the class."""
        named = {t.input: s for t, s in zip(self.state_tensors, states, strict=True)}
        cache = FixedCache(self.layers, named, attention_mask, input_ids.shape[1])
        result: Any = self.model(
            input_ids=input_ids,
            # A 4-D mask is handed through as it is, and no converted layer reads it.
            attention_mask=input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return (result.logits, *cache.written())

    def example(
        self, batch: int, new: int, past: int, capacity: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Arguments of these sizes: zero states, no padding.

        States with a row for several tokens get a number of rows that is nothing else's.
        """
        position = torch.arange(past, past + new)[None].expand(batch, -1).contiguous()
        rows = [
            (capacity + 6) * t.block if t.per_block or t.block > 1 else capacity
            for t in self.state_tensors
        ]
        shapes = [t.shape(batch, c) for t, c in zip(self.state_tensors, rows, strict=True)]
        states = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        return torch.zeros(batch, new, dtype=torch.int64), mask, position, states


def check_language_model(model: nn.Module) -> None:
    """Only models that map token ids to logits are exported.

    Raises:
        ArgumentError: the model is of another type.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ArgumentError(
            "only decoder-only language models can be exported to ONNX without an example",
            where=type(model).__name__,
            next_step="encoders, vision and diffusion models: pass inputs={...}, and one pass is "
            "written",
        )
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ArgumentError(
            "the model has no language-model head, so it has no logits to export",
            where=type(model).__name__,
            why="a file decodes token by token, or is of a converted model without caches",
            next_step="load a language model with AutoModelForCausalLM; an encoder is converted "
            'first (convert(model, plan="identity") keeps it as it is), or pass inputs={...}, an '
            "example, and one pass is written",
        )
