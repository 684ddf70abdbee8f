"""Linear attention in the `ort` flavour: ONNX Runtime's own LinearAttention (`com.microsoft`).

It is the recurrence of `ai.reattend::LinearAttention` over packed heads, [B, N, H * width], with
the state as input and output; the denominator is a column of ones in the values, as there. A window
beside the state has no such operator.
"""

from __future__ import annotations

from typing import Any

from reattend.targets.onnx.contrib import CONTRIB, Form, flat, state_output, unflatten
from reattend.targets.onnx.functions import DOMAIN
from reattend.targets.onnx.gated_linear_body import GATED
from reattend.targets.onnx.linear_translate import HEADS
from reattend.targets.onnx.rewriting import attribute, take_over


def sum_states(model: Any) -> dict[str, Form]:
    """Replace every `LinearAttention` and `GatedLinearAttention` node.

    Args:
        model: an `onnx_ir.Model`, changed in place.

    Returns:
        State output -> the form its node has now.
    """
    import onnx_ir as ir

    found: dict[str, Form] = {}
    kinds = ("LinearAttention", GATED)
    nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type in kinds]
    for node in nodes:
        q, key, value, decay, past = node.inputs
        inputs = [*(flat(model, node, rows) for rows in (q, key, value)), past]
        featured = node.op_type == GATED
        decays = featured or bool(attribute(node, "decays"))
        if featured:
            inputs.append(flat(model, node, decay))
        elif decays:
            turned = ir.node("Transpose", [decay], {"perm": [0, 2, 1]})
            model.graph.insert_before(node, turned)
            inputs.append(turned.outputs[0])
        attributes = {
            **{name: attribute(node, name) for name in HEADS}, "scale": 1.0,
            "update_rule": "gated" if decays else "linear",
        }  # fmt: skip
        made = ir.node("LinearAttention", inputs, attributes, domain=CONTRIB, num_outputs=2)
        model.graph.insert_before(node, made)
        found[state_output(node)] = Form(f"{CONTRIB}::LinearAttention")
        take_over(node.outputs[1], made.outputs[1])
        unflatten(model, node, made.outputs[0], attribute(node, HEADS[0]))
    if found:
        model.opset_imports[CONTRIB] = 1
    return found
