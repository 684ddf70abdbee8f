"""The meaning of our nodes in standard ops: one function body each, attached to every model.

The texts are in ONNX's own textual syntax, a file per family: `dense_body.py`, `sparse_body.py`,
`pattern_body.py`, `kept_body.py`, `selected_body.py`, `routed_body.py`, `linear_body.py`,
`gated_linear_body.py`, `window_linear_body.py`, `encoder_body.py` and `encoder_observed.py`. Only
standard operators are used, so any runtime runs the file; a kernel registered for the node's name
takes over where one is loaded.

Semantics are those of `reattend::attention`: query i is at index kv_len - N + i and sees key j iff
kv_start <= j < kv_len, j <= index (causal) and index - j < sliding_window (if > 0). A query that
sees nothing gives 0. Rows outside [kv_start, kv_len) must hold finite numbers: some are
read, for a weight of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reattend.targets.onnx.dense_body import dense_body
from reattend.targets.onnx.encoder_body import ENCODER, encoder_body
from reattend.targets.onnx.encoder_observed import OBSERVED, observed_body
from reattend.targets.onnx.gated_linear_body import GATED, gated_linear_body
from reattend.targets.onnx.kept_body import KEPT, kept_body
from reattend.targets.onnx.linear_body import linear_body
from reattend.targets.onnx.linear_features import MAPS
from reattend.targets.onnx.pattern_body import pattern_body
from reattend.targets.onnx.pattern_terms import TERMS
from reattend.targets.onnx.routed_body import NAME as ROUTED
from reattend.targets.onnx.routed_body import routed_body
from reattend.targets.onnx.selected_body import CALLING, SELECTED, selected_body
from reattend.targets.onnx.selected_choice import BUDGETS
from reattend.targets.onnx.sparse_body import sparse_body
from reattend.targets.onnx.window_linear_body import window_linear_body

DOMAIN = "ai.reattend"
VERSION = 1
OPSET = 24

_DOMAIN_LINE = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n'
_OWN_DOMAIN_LINE = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>\n'


@dataclass(frozen=True)
class Uses:
    """What the nodes of one file need of their bodies; the rest is left out.

    Attributes:
        rope_may_be_empty: some latent node has R = 0.
        terms: terms that some `PatternAttention` or `KeptAttention` has.
        budgets: budgets that some node of `selected_body` has.
        capped: some node has a softcap.
        sliding: the block of some node has a window of its own.
        decayed: some node of linear attention has decays.
        maps: feature maps that some `WindowLinearAttention` has.
    """

    rope_may_be_empty: bool = True
    terms: tuple[str, ...] = tuple(TERMS)
    budgets: tuple[str, ...] = tuple(BUDGETS)
    capped: bool = True
    sliding: bool = True
    decayed: bool = True
    maps: tuple[str, ...] = MAPS


EVERYTHING = Uses()


#: nodes whose bodies call another of ours
CALLS = dict.fromkeys((ROUTED, *CALLING), "Attention")


def with_called(names: set[str]) -> list[str]:
    """The functions a file with these nodes needs, sorted."""
    return sorted(names | {CALLS[name] for name in names if name in CALLS})


def function_text(name: str, uses: Uses = EVERYTHING) -> str:
    """The body of `ai.reattend::<name>` in ONNX's textual syntax."""
    if name == "SparseAttention":
        return _DOMAIN_LINE + sparse_body(uses.capped, uses.sliding)
    if name == "PatternAttention":
        return _DOMAIN_LINE + pattern_body(uses.terms, uses.capped, uses.sliding)
    if name == KEPT:
        return _DOMAIN_LINE + kept_body(uses.terms, uses.capped, uses.sliding)
    if name == ROUTED:
        return _OWN_DOMAIN_LINE + routed_body(uses.capped)
    if name == "LinearAttention":
        return _DOMAIN_LINE + linear_body(uses.decayed)
    if name == GATED:
        return _DOMAIN_LINE + gated_linear_body()
    if name == "WindowLinearAttention":
        return _DOMAIN_LINE + window_linear_body(uses.decayed, uses.maps)
    if name in SELECTED:
        line = _OWN_DOMAIN_LINE if name in CALLS else _DOMAIN_LINE
        return line + selected_body(name, uses.budgets, uses.capped, uses.sliding)
    if name in ENCODER:
        return _DOMAIN_LINE + encoder_body(name, uses.capped)
    if name == OBSERVED:
        return _DOMAIN_LINE + observed_body(uses.capped)
    return _DOMAIN_LINE + dense_body(name, uses.rope_may_be_empty, uses.capped, uses.sliding)


def function_proto(name: str, uses: Uses = EVERYTHING) -> Any:
    """`ai.reattend::<name>` version 1 as an `onnx.FunctionProto`.

    Args:
        name: `LatentAttention` (q_nope [B, H, N, r], q_rope [B, H, N, R], latent [B, C, r], rope
            [B, C, R], kv_start [B], kv_len [B]) -> y [B, H, N, r], `Attention` (q [B, H, N, d],
            key [B, G, C, d], value [B, G, C, e], kv_start, kv_len) -> y [B, H, N, e],
            `PatternAttention` (the same inputs), `RoutedAttention` (the same and, before kv_start,
            active [B, U, N]; it calls `Attention`), or `SparseAttention` (q, key [B, G, N, d],
            value [B, G, N, e], past_key [B, G, sinks + window, d], past_value, kv_start, kv_len)
            -> y, present_key, present_value, or `KeptAttention` (the same with ring_key,
            ring_value, kept_key, kept_value as states); or one of `selected_body.KINDS`,
            of `linear_body.LINEAR`, or of `encoder_body.ENCODER`.
        uses: what the nodes of the file need.
    """
    import onnx.parser

    return onnx.parser.parse_function(function_text(name, uses))
