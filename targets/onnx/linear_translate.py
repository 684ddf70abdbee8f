"""How the torch ops of linear attention become ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reattend.errors import ArgumentError
from reattend.kernels.linear_attention import linear_attention as _sums  # noqa: F401
from reattend.targets.onnx.gated_linear_body import GATED
from reattend.targets.onnx.linear_features import MAPS
from reattend.targets.onnx.linear_ops import held_linear_attention as _held  # noqa: F401
from reattend.targets.onnx.linear_ops import window_linear_attention as _window  # noqa: F401
from reattend.targets.onnx.schema import our_op

#: Tokens of a chunk, at least.
CHUNK = 64
#: Heads of queries and of the state.
HEADS = ("q_num_heads", "kv_num_heads")
_HELD = ("q", "key", "value", "decay", "past_state")
_WINDOW = (
    "q", "features", "key", "value", "past_key", "past_value", "past_state", "mix", "weight",
    "bias", "decay", "kv_start", "kv_len",
)  # fmt: skip


def linear_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entries of `custom_translation_table`."""
    made = ("y", "present_state")
    held = our_op("LinearAttention", _HELD, made, dict.fromkeys(("chunk", "decays", *HEADS), "int"))
    gated = our_op(GATED, _HELD, made, dict.fromkeys(HEADS, "int"))
    whole = ("window", "chunk", "feature_map", "terraced", "decays")
    node = our_op(
        "WindowLinearAttention",
        _WINDOW,
        ("y", "present_key", "present_value", "present_state"),
        {"scale": "float", **dict.fromkeys(whole, "int")},
        dict.fromkeys(("kv_start", "kv_len"), "I"),
    )

    def translate_held(q: Any, k: Any, v: Any, decay: Any, state: Any, *, decays: bool) -> Any:
        counts = dict(zip(HEADS, (int(q.shape[1]), int(k.shape[1])), strict=True))
        if len(decay.shape) == 4:
            return gated(q, k, v, decay, state, **counts)
        return held(q, k, v, decay, state, chunk=CHUNK, decays=int(decays), **counts)

    def translate_window(
        *inputs: Any, scale: float, window: int, terraced: bool, feature_map: str, decays: bool
    ) -> Any:
        return node(
            *inputs, scale=float(scale), window=int(window), terraced=int(terraced),
            chunk=max(CHUNK, window * (2 if terraced else 1)),
            feature_map=MAPS.index(feature_map), decays=int(decays),
        )  # fmt: skip

    return {
        torch.ops.reattend.linear_attention.default: _translate_sums,
        torch.ops.reattend.held_linear_attention.default: translate_held,
        torch.ops.reattend.window_linear_attention.default: translate_window,
    }


def _translate_sums(
    q: Any, k: Any, v: Any, decay: Any = None, state: Any = None, *rules: Any, **more: Any
) -> Any:
    """Two products, of a block in which every token sees all; others are traced as nodes."""
    from onnxscript import opset18

    bidirectional = more.get("bidirectional", len(rules) > 3 and rules[3])
    if not bidirectional or state is not None or more.get("normalize", any(rules[2:3])):
        raise ArgumentError(
            "a call of reattend::linear_attention has no translation to ONNX",
            why="only plain sums over all keys are written in standard operators",
            next_step="export the model as reattend converted it: its mixers use what has a node",
        )
    heads, groups = int(q.shape[1]), int(k.shape[1])
    after = opset18.MatMul(opset18.Transpose(k, perm=[0, 1, 3, 2]), v)
    if heads == groups:
        return opset18.MatMul(q, after), after
    rows = opset18.Constant(value_ints=[0, groups, -1, int(q.shape[3])])
    # heads of a group follow each other: their queries are rows of one product
    y = opset18.MatMul(opset18.Reshape(q, rows), after)
    back = opset18.Constant(value_ints=[0, heads, -1, int(v.shape[3])])
    return opset18.Reshape(y, back), after
