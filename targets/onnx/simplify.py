"""Small rewrites of the exported graph that a runtime would not do by itself."""

from __future__ import annotations

from typing import Any


def fuse_norms(model: Any) -> int:
    """Write each spelled-out RMS norm as the standard RMSNormalization: one kernel, not six.

    Args:
        model: an `onnx_ir.Model` of opset 23 or later, changed in place.

    Returns:
        The number of norms replaced.
    """
    from onnxscript.rewriter.rules.fusion import _rms_normalization as rules

    count: int = rules.rms_normalization_ruleset.apply_to_model(model)
    for node in model.graph.all_nodes():
        if node.op_type == "RMSNormalization" and not node.domain:
            _one_type(node)
    return count


def _one_type(node: Any) -> None:
    """Give the input of a norm the type of its scale, the wider one of both always.

    A norm whose gain is wider than its input (Gemma's, in float16) gives the type of the gain, as
    the operator is specified; onnx's own shape inference expects that of the input (1.23).
    """
    import onnx_ir as ir

    x, scale = node.inputs[:2]
    if x.dtype == scale.dtype:
        return
    wide = max(x.dtype, scale.dtype, key=lambda kind: kind.itemsize)
    for index, value in enumerate((x, scale)):
        if value.dtype != wide:
            cast = ir.node("Cast", [value], {"to": wide})
            cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wide)
            node.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    given = node.outputs[0]
    if given.dtype != wide:  # the gain was the narrower one: what follows reads its type
        back = ir.node("Cast", [given], {"to": given.dtype})
        back.outputs[0].shape, back.outputs[0].type = given.shape, given.type
        node.graph.insert_after(node, back)
        ir.convenience.replace_all_uses_with(given, back.outputs[0], replace_graph_outputs=True)
        back.replace_input_with(0, given)
        given.type = ir.TensorType(wide)


def cancel_squeezes(model: Any) -> int:
    """Replace Squeeze(Unsqueeze(x, a), a) by x.

    The mixers see a latent state as one head, [B, 1, C, r], while its tensor is [B, C, r]: the
    pair would stand between the scattered state and its reader, and a runtime that does not alias
    both would copy the whole state at every step.

    Args:
        model: an `onnx_ir.Model`, changed in place.

    Returns:
        The number of pairs removed.
    """
    import onnx_ir as ir

    removed = 0
    for node in list(model.graph):
        if node.op_type != "Squeeze" or node.domain:
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Unsqueeze" or _axes(node) != _axes(inner):
            continue
        if _axes(node) is None or node.outputs[0].is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], inner.inputs[0])
        model.graph.remove(node, safe=True)
        if not inner.outputs[0].uses() and not inner.outputs[0].is_graph_output():
            model.graph.remove(inner, safe=True)
        removed += 1
    return removed


def _axes(node: Any) -> tuple[int, ...] | None:
    if len(node.inputs) < 2 or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    return tuple(int(a) for a in node.inputs[1].const_value.numpy().ravel())
