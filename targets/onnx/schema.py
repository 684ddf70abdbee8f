"""Ops of our domain as the exporter calls them: a name, inputs, outputs and attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reattend.targets.onnx.functions import DOMAIN, VERSION

_TYPES = {
    "T": ["tensor(float)", "tensor(float16)"],
    "I": ["tensor(int64)", "tensor(int32)"],
    "S": ["tensor(bool)"],
}


def our_op(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, str],
    kinds: Mapping[str, str] | None = None,
) -> Any:
    """The `onnxscript` op `ai.reattend::<name>`.

    Args:
        name: of the node.
        inputs, outputs: their names, in order.
        attributes: their types in ONNX's words: `int`, `ints`, `float`, `tensor`, ...
        kinds: of inputs and outputs that are no rows: `I` whole numbers, `S` bools.
    """
    import onnx.defs as defs
    from onnxscript import values

    told = kinds or {}
    letter = {x: told.get(x, "T") for x in (*inputs, *outputs)}
    parameter, types = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType
    schema = defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[parameter(x, letter[x]) for x in inputs],
        outputs=[parameter(x, letter[x]) for x in outputs],
        type_constraints=[(x, _TYPES[x], "") for x in sorted(set(letter.values()))],
        attributes=[
            defs.OpSchema.Attribute(x, getattr(types, kind.upper()))
            for x, kind in attributes.items()
        ],
    )
    return values.Op(values.Opset(DOMAIN, VERSION), name, schema)
