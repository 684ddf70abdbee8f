"""How the torch ops of reattend become ONNX nodes.

The attention ops become one node each in domain `ai.reattend` (those of sparse heads in
`sparse_translate.py`, those of linear attention in `linear_translate.py`); `cache_put` is the
standard TensorScatter. A translation must be an ordinary Python function that calls `values.Op`: a
scripted onnxscript function would be inlined, and no node of ours would be left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reattend.errors import ArgumentError
from reattend.targets.onnx.encoder_translate import encoder_translations
from reattend.targets.onnx.functions import OPSET
from reattend.targets.onnx.linear_translate import linear_translations
from reattend.targets.onnx.routed_body import NAME as ROUTED
from reattend.targets.onnx.schema import our_op
from reattend.targets.onnx.selected_translate import selected_translations
from reattend.targets.onnx.sparse_translate import sparse_translations


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` of `torch.onnx.export`."""
    rows = ("q", "key", "value")
    attention = _attention_op("Attention", *rows)
    latent = _attention_op("LatentAttention", "q_nope", "q_rope", "latent", "rope")
    routed = _attention_op(ROUTED, *rows, "active")
    scatter = _scatter_op()

    def translate_attention(
        q: Any, k: Any, v: Any, start: Any, length: Any, table: Any = None, **scalars: Any
    ) -> Any:
        _no_pages(table)
        return _with_lse(attention(q, k, v, start, length, **_attributes(**scalars)))

    def translate_latent(
        q_nope: Any, q_rope: Any, latent_rows: Any, rope_rows: Any, start: Any, length: Any,
        table: Any = None, **scalars: Any,
    ) -> Any:  # fmt: skip
        _no_pages(table)
        inputs = (q_nope, q_rope, latent_rows, rope_rows, start, length)
        return _with_lse(latent(*inputs, **_attributes(**scalars)))

    def translate_routed(
        q: Any, k: Any, v: Any, active: Any, start: Any, length: Any, **scalars: Any
    ) -> Any:
        return _with_lse(routed(q, k, v, active, start, length, **_attributes(**scalars)))

    def translate_put(cache: Any, new: Any, start: Any, axis: int) -> Any:
        return scatter(cache, new, start, axis=axis)

    return (
        sparse_translations()
        | linear_translations()
        | selected_translations()
        | encoder_translations()
        | {
            torch.ops.reattend.attention.default: translate_attention,
            torch.ops.reattend.latent_attention.default: translate_latent,
            torch.ops.reattend.routed_attention.default: translate_routed,
            torch.ops.reattend.cache_put.default: translate_put,
            torch.ops.aten.sort.stable: _translate_sort,
        }
    )


def _attributes(
    scale: float, causal: bool = True, sliding_window: int = 0, softcap: float = 0.0
) -> dict[str, Any]:
    """All of them, defaults too: onnx's reference evaluator does not fill defaults in."""
    return {
        "scale": float(scale),
        "causal": int(causal),
        "sliding_window": int(sliding_window),
        "softcap": float(softcap),
    }


def _with_lse(y: Any) -> tuple[Any, Any]:
    """The torch op also returns the log-sum-exp, which no mixer reads.

    A value must stand for it (a second one: the exporter writes its shape on it); nothing uses
    the node made for it, so the exporter's optimiser removes it.
    """
    from onnxscript import opset18

    return y, opset18.Identity(y)


def _translate_sort(
    x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    """TopK of all: the first of equals comes first, which is what `stable` asks for."""
    from onnxscript import opset18

    sizes = opset18.Shape(x, start=dim, end=dim + 1) if dim != -1 else opset18.Shape(x, start=-1)
    return opset18.TopK(x, sizes, axis=dim, largest=int(descending), sorted=1)


def _no_pages(table: Any) -> None:
    if table is not None:
        raise ArgumentError("a paged cache (block table) has no ONNX form")


def _attention_op(name: str, *inputs: str) -> Any:
    whole = ("causal", "sliding_window")
    rules = {"scale": "float", "softcap": "float", **dict.fromkeys(whole, "int")}
    kinds = {"active": "S", "kv_start": "I", "kv_len": "I"}
    return our_op(name, (*inputs, "kv_start", "kv_len"), ("y",), rules, kinds)


def _scatter_op() -> Any:
    import onnx.defs as defs
    from onnxscript import values

    schema = defs.get_schema("TensorScatter", OPSET, "")
    return values.Op(values.Opset("", OPSET), "TensorScatter", schema)
