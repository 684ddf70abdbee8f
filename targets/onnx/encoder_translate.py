"""How the torch ops of models without states become ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reattend.targets.onnx.encoder_body import ENCODER
from reattend.targets.onnx.encoder_observed import INPUTS, OBSERVED
from reattend.targets.onnx.encoder_observed import observed_attention as _observed  # noqa: F401
from reattend.targets.onnx.encoder_ops import masked_attention as _masked  # noqa: F401
from reattend.targets.onnx.functions import DOMAIN, VERSION

_FLOATS = ["tensor(float)", "tensor(float16)"]


def encoder_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entries of `custom_translation_table`."""

    def translate_masked(q: Any, k: Any, v: Any, seen: Any, scale: float, softcap: float) -> Any:
        return _node("MaskedAttention")(q, k, v, seen, scale=float(scale), softcap=float(softcap))

    def translate_regions(
        q: Any, k: Any, v: Any, query_rows: Any, key_rows: Any, seen: Any, at: Any, scale: float,
        softcap: float,
    ) -> Any:  # fmt: skip
        name = "RegionAttention" if len(key_rows.shape) == 2 else "ChosenRegionAttention"
        rules = {"scale": float(scale), "softcap": float(softcap)}
        return _node(name)(q, k, v, query_rows, key_rows, seen, at, **rules)

    def translate_observed(
        q: Any, k: Any, v: Any, past: Any, phase: Any, prompt: Any, block: int, topk: int,
        ratio: float, scale: float, softcap: float,
    ) -> Any:  # fmt: skip
        return _node(OBSERVED)(
            q, k, v, past, phase, prompt, block=int(block), topk=int(topk), ratio=float(ratio),
            scale=float(scale), softcap=float(softcap),
        )  # fmt: skip

    return {
        torch.ops.reattend.observed_attention.default: translate_observed,
        torch.ops.reattend.masked_attention.default: translate_masked,
        torch.ops.reattend.region_attention.default: translate_regions,
    }


def _node(name: str) -> Any:
    """The op of a node of `ENCODER`."""
    import onnx.defs as defs
    from onnxscript import values

    parameter, kind = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType
    types = dict.fromkeys(("q", "key", "value"), "T") | {"seen": "S"}
    observed = name == OBSERVED
    outputs = [parameter("y", "T")] + [parameter("blocks", "I")] * observed
    more = {"block": kind.INT, "topk": kind.INT, "ratio": kind.FLOAT} if observed else {}
    attributes = {"scale": kind.FLOAT, "softcap": kind.FLOAT, **more}
    inputs = [parameter(x, types.get(x, "I")) for x in (INPUTS if observed else ENCODER[name])]
    schema = defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[
            ("T", _FLOATS, ""), ("I", ["tensor(int64)"], ""),
            *([("S", ["tensor(bool)"], "")] if "seen" in ENCODER.get(name, ()) else []),
        ],
        attributes=[defs.OpSchema.Attribute(n, k) for n, k in attributes.items()],
    )  # fmt: skip
    return values.Op(values.Opset(DOMAIN, VERSION), name, schema)
