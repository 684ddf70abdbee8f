"""How the torch ops of reattend become ONNX nodes.

The attention ops become one node each in domain `ai.reattend` (those of sparse heads in
`sparse_translate.py`); `cache_put` is the standard TensorScatter. A translation must be an ordinary
Python function that calls `values.Op`: a scripted onnxscript function would be inlined, and no node
of ours would be left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reattend.errors import ArgumentError
from reattend.targets.onnx.functions import DOMAIN, OPSET, VERSION
from reattend.targets.onnx.selected_translate import selected_translations
from reattend.targets.onnx.sparse_translate import sparse_translations

_TYPES = ["tensor(float)", "tensor(float16)"]
_INDEX = ["tensor(int64)", "tensor(int32)"]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` of `torch.onnx.export`."""
    attention = _attention_op("Attention", 3)
    latent = _attention_op("LatentAttention", 4)
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

    def translate_put(cache: Any, new: Any, start: Any, axis: int) -> Any:
        return scatter(cache, new, start, axis=axis)

    return (
        sparse_translations()
        | selected_translations()
        | {
            torch.ops.reattend.attention.default: translate_attention,
            torch.ops.reattend.latent_attention.default: translate_latent,
            torch.ops.reattend.cache_put.default: translate_put,
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


def _no_pages(table: Any) -> None:
    if table is not None:
        raise ArgumentError("a paged cache (block table) has no ONNX form")


def _attention_op(name: str, floats: int) -> Any:
    import onnx.defs as defs
    from onnxscript import values

    parameter = defs.OpSchema.FormalParameter
    schema = defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            *(parameter(f"x{i}", "T") for i in range(floats)),
            parameter("kv_start", "I"),
            parameter("kv_len", "I"),
        ],
        outputs=[parameter("y", "T")],
        type_constraints=[("T", _TYPES, ""), ("I", _INDEX, "")],
        attributes=[
            defs.OpSchema.Attribute("scale", defs.OpSchema.AttrType.FLOAT),
            defs.OpSchema.Attribute("causal", defs.OpSchema.AttrType.INT),
            defs.OpSchema.Attribute("sliding_window", defs.OpSchema.AttrType.INT),
            defs.OpSchema.Attribute("softcap", defs.OpSchema.AttrType.FLOAT),
        ],
    )
    return values.Op(values.Opset(DOMAIN, VERSION), name, schema)


def _scatter_op() -> Any:
    import onnx.defs as defs
    from onnxscript import values

    schema = defs.get_schema("TensorScatter", OPSET, "")
    return values.Op(values.Opset("", OPSET), "TensorScatter", schema)
