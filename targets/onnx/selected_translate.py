"""How the torch op of heads that select keys becomes an ONNX node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from reattend.mixers.config import RotaryConfig
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.schema import our_op
from reattend.targets.onnx.selected_body import INTEGERS, KINDS
from reattend.targets.onnx.selected_layout import attributes, node_name
from reattend.targets.onnx.selected_ops import selected_attention as _op  # noqa: F401


def selected_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entry of `custom_translation_table`."""

    def translate(
        q: Any, k: Any, v: Any, past_key: Any, past_value: Any, more: Any, recent: Any,
        weights: Any, start: Any, length: Any, *, pattern: str, scale: float,
        sliding_window: int = 0, softcap: float = 0.0, inv_freq: Sequence[float] = (),
    ) -> Any:  # fmt: skip
        from onnxscript import opset18

        described = HeadPattern.model_validate_json(pattern)
        assert described.select is not None
        name = node_name(described.select)
        kind = KINDS[name]
        given = [more, recent][: len(kind.inputs) - len(weights)]
        rotary = RotaryConfig(inv_freq=tuple(inv_freq)) if inv_freq else None
        y, *others = _node(name)(
            q, k, v, past_key, past_value, *given, *weights, start, length, scale=float(scale),
            sliding_window=int(sliding_window), softcap=float(softcap),
            **attributes(described, rotary),
        )  # fmt: skip
        # the torch op always gives five values; nothing reads what stands for a missing one
        return (y, *others, *(opset18.Identity(y) for _ in range(4 - len(others))))

    return {torch.ops.reattend.selected_attention.default: translate}


def _node(name: str) -> Any:
    """The op of a node of `selected_body.KINDS`."""
    kind = KINDS[name]
    whole = dict.fromkeys(INTEGERS, "I")
    return our_op(name, kind.all_inputs, kind.all_outputs, kind.attributes, whole)
