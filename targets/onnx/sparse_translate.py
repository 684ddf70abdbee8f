"""How the torch ops of sparse heads become ONNX nodes, and what the nodes' attributes say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.kept_body import KEPT, KNOWN
from reattend.targets.onnx.rewriting import attribute
from reattend.targets.onnx.schema import our_op
from reattend.targets.onnx.sparse_ops import kept_attention as _kept  # noqa: F401
from reattend.targets.onnx.sparse_ops import pattern_attention as _pattern  # noqa: F401
from reattend.targets.onnx.sparse_ops import sink_window_attention as _window  # noqa: F401

_SPAN = ("kv_start", "kv_len")
_RULES = {"scale": "float", "softcap": "float", "sliding_window": "int"}
#: a term that a node does not have
_NO_STRIDE, _NONE_LISTED = [0, 0, 1], [-1]


def sparse_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entries of `custom_translation_table` for sparse heads."""
    sparse, pattern_node, kept = _sparse_op(), _pattern_op(), _kept_op()

    def translate_window(
        q: Any, k: Any, v: Any, past_key: Any, past_value: Any, start: Any, length: Any, *,
        sinks: int, window: int, scale: float, sliding_window: int = 0, softcap: float = 0.0,
    ) -> Any:  # fmt: skip
        return sparse(
            q, k, v, past_key, past_value, start, length,
            sinks=int(sinks), window=int(window), scale=float(scale),
            sliding_window=int(sliding_window), softcap=float(softcap),
        )  # fmt: skip

    def translate_pattern(
        q: Any, k: Any, v: Any, start: Any, length: Any, *,
        pattern: str, scale: float, sliding_window: int = 0, softcap: float = 0.0,
    ) -> Any:  # fmt: skip
        terms = pattern_attributes(HeadPattern.model_validate_json(pattern))
        return pattern_node(
            q, k, v, start, length,
            scale=float(scale), sliding_window=int(sliding_window), softcap=float(softcap), **terms,
        )  # fmt: skip

    def translate_kept(
        q: Any, k: Any, v: Any, ring_key: Any, ring_value: Any, kept_key: Any, kept_value: Any,
        start: Any, length: Any, *,
        pattern: str, scale: float, sliding_window: int = 0, softcap: float = 0.0,
    ) -> Any:  # fmt: skip
        return kept(
            q, k, v, ring_key, ring_value, kept_key, kept_value, start, length,
            scale=float(scale), sliding_window=int(sliding_window), softcap=float(softcap),
            **kept_attributes(HeadPattern.model_validate_json(pattern)),
        )  # fmt: skip

    return {
        torch.ops.reattend.kept_attention.default: translate_kept,
        torch.ops.reattend.sink_window_attention.default: translate_window,
        torch.ops.reattend.pattern_attention.default: translate_pattern,
    }


def pattern_attributes(pattern: HeadPattern) -> dict[str, Any]:
    """The terms of a pattern as attributes of `PatternAttention`; all of them, as it needs them.

    The slope is a float64: with less, windows of long texts would differ by a token.
    """
    from onnx import numpy_helper

    stride = pattern.stride
    return {
        "sinks": pattern.sinks,
        # a query sees itself
        "window": pattern.window if pattern.window_slope else max(pattern.window, 1),
        "window_slope": numpy_helper.from_array(np.array(pattern.window_slope, np.float64)),
        "stride": [stride.period, stride.offset, stride.block] if stride else _NO_STRIDE,
        "powers": pattern.powers.block if pattern.powers else 0,
        "columns": list(pattern.columns) or _NONE_LISTED,
        "slashes": list(pattern.slashes) or _NONE_LISTED,
    }


def kept_attributes(pattern: HeadPattern) -> dict[str, Any]:
    """The same for `KeptAttention`, which knows fewer terms."""
    return {name: value for name, value in pattern_attributes(pattern).items() if name in KNOWN}


def has_term(node: Any, term: str) -> bool:
    """Whether a node of an `onnx_ir` graph has a term of `TERMS`."""
    if node.op_type not in ("PatternAttention", KEPT) or term not in node.attributes:
        return False
    given = attribute(node, term)
    if term == "window_slope":
        return bool(given.numpy())
    if term == "stride":
        return list(given) != _NO_STRIDE
    if term in ("columns", "slashes"):
        return list(given) != _NONE_LISTED
    return bool(given)


def _sparse_op() -> Any:
    names = ("q", "key", "value", "past_key", "past_value", *_SPAN)
    outputs = ("y", "present_key", "present_value")
    attributes = _RULES | {"window": "int", "sinks": "int"}
    return our_op("SparseAttention", names, outputs, attributes, dict.fromkeys(_SPAN, "I"))


_TERMS = {
    "sinks": "int", "window": "int", "window_slope": "tensor", "stride": "ints", "powers": "int",
    "columns": "ints", "slashes": "ints",
}  # fmt: skip


def _kept_op() -> Any:
    attributes = _RULES | {name: kind for name, kind in _TERMS.items() if name in KNOWN}
    states = ("ring_key", "ring_value", "kept_key", "kept_value")
    past = ("past_ring_key", "past_ring_value", "past_key", "past_value")
    names = ("q", "key", "value", *past, *_SPAN)
    return our_op(KEPT, names, ("y", *states), attributes, dict.fromkeys(_SPAN, "I"))


def _pattern_op() -> Any:
    attributes = _RULES | _TERMS
    names = ("q", "key", "value", *_SPAN)
    return our_op("PatternAttention", names, ("y",), attributes, dict.fromkeys(_SPAN, "I"))
