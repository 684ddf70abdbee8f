"""The flavours of an ONNX file: which operators its attention layers are.

All hold the same states under the same names; `manifest.json` says which flavour a file is, and
for every layer which form its node took and why.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from reattend.errors import ArgumentError
from reattend.plan_words import nearest
from reattend.targets.onnx.contrib import Form, group_queries, skip_norms, state_output
from reattend.targets.onnx.contrib_linear import sum_states
from reattend.targets.onnx.functions import DOMAIN

Flavour = Literal["portable", "ort", "custom"]
FLAVOURS: dict[str, str] = {
    "portable": "function bodies in standard operators: any runtime of opset 24",
    "ort": "ONNX Runtime's own operators where they win: ONNX Runtime only",
    "custom": "the portable file, run with the kernels of reattend's own library",
}


def check_flavour(name: str) -> Flavour:
    """The name of a flavour, checked.

    Raises:
        ArgumentError: there is none of that name; the nearest one is named.
    """
    if name not in FLAVOURS:
        close = nearest(name, FLAVOURS)
        raise ArgumentError(
            f"unknown ONNX flavour {name!r}",
            why="; ".join(f"{known}: {what}" for known, what in FLAVOURS.items()),
            next_step=f"did you mean {close[0]!r}?" if close else "use one of those",
        )
    return cast("Flavour", name)


def choose_forms(model: Any, flavour: Flavour) -> dict[str, Form]:
    """Rewrite the nodes of an exported graph for a flavour.

    Args:
        model: an `onnx_ir.Model` with one node of ours per head group, changed in place.
        flavour: `custom` changes nothing: the kernels take over the nodes that are there.

    Returns:
        First state output of each head group -> what its node is now.
    """
    if flavour == "ort":
        inputs = {value.name: value for value in model.graph.inputs}
        forms = group_queries(model, inputs["input_ids"], inputs["attention_mask"])
        forms |= sum_states(model)
        skip_norms(model)
        return forms
    forms = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            forms[state_output(node)] = Form(f"{DOMAIN}::{node.op_type}")
    return forms
