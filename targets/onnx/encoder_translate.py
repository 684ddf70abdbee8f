"""How the torch ops of models without states become ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from reattend.targets.onnx.encoder_band import BAND
from reattend.targets.onnx.encoder_band import band_attention as _band  # noqa: F401
from reattend.targets.onnx.encoder_body import ENCODER, WHOLE
from reattend.targets.onnx.encoder_observed import INPUTS, OBSERVED
from reattend.targets.onnx.encoder_observed import observed_attention as _observed  # noqa: F401
from reattend.targets.onnx.encoder_ops import masked_attention as _masked  # noqa: F401
from reattend.targets.onnx.schema import our_op

_RULES = {"scale": "float", "softcap": "float"}


def encoder_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entries of `custom_translation_table`."""

    more = {"block": "int", "topk": "int", "ratio": "float"}
    whole = dict.fromkeys((*INPUTS[3:], "blocks"), "I")
    observed = our_op(OBSERVED, INPUTS, ("y", "blocks"), _RULES | more, whole)

    def translate_masked(q: Any, k: Any, v: Any, seen: Any, scale: float, softcap: float) -> Any:
        return _node("MaskedAttention")(q, k, v, seen, scale=float(scale), softcap=float(softcap))

    def translate_regions(
        q: Any, k: Any, v: Any, query_rows: Any, key_rows: Any, seen: Any, spans: Any, at: Any,
        scale: float, softcap: float,
    ) -> Any:  # fmt: skip
        rules = {"scale": float(scale), "softcap": float(softcap)}
        return _node("RegionAttention")(q, k, v, query_rows, key_rows, seen, spans, at, **rules)

    def translate_chosen(
        q: Any, k: Any, v: Any, query_rows: Any, key_rows: Any, seen: Any, at: Any, scale: float,
        softcap: float,
    ) -> Any:  # fmt: skip
        rules = {"scale": float(scale), "softcap": float(softcap)}
        return _node("ChosenRegionAttention")(q, k, v, query_rows, key_rows, seen, at, **rules)

    def translate_band(
        q: Any, k: Any, v: Any, place: Any, sinks: int, window: int, scale: float, softcap: float
    ) -> Any:
        rules = {"scale": float(scale), "softcap": float(softcap)}
        return _node(BAND)(q, k, v, place, sinks=int(sinks), window=int(window), **rules)

    def translate_observed(
        q: Any, k: Any, v: Any, past: Any, phase: Any, prompt: Any, block: int, topk: int,
        ratio: float, scale: float, softcap: float,
    ) -> Any:  # fmt: skip
        return observed(
            q, k, v, past, phase, prompt, block=int(block), topk=int(topk), ratio=float(ratio),
            scale=float(scale), softcap=float(softcap),
        )  # fmt: skip

    return {
        torch.ops.reattend.observed_attention.default: translate_observed,
        torch.ops.reattend.band_attention.default: translate_band,
        torch.ops.reattend.masked_attention.default: translate_masked,
        torch.ops.reattend.region_attention.default: translate_regions,
        torch.ops.reattend.chosen_attention.default: translate_chosen,
    }


def _node(name: str) -> Any:
    """The op of a node of `ENCODER`."""
    kinds = dict.fromkeys(ENCODER[name], "I") | dict.fromkeys(("q", "key", "value"), "T")
    rules = _RULES | dict.fromkeys(WHOLE.get(name, ()), "int")
    return our_op(name, ENCODER[name], ("y",), rules, kinds | {"seen": "S"})
