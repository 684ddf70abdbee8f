"""The `ort` flavour: ONNX Runtime's own operators (domain `com.microsoft`) where they win.

`ai.reattend::Attention` becomes GroupQueryAttention, one kernel that also writes keys and values
into the state in place; an addition in front of an RMS norm becomes part of it. Latent layers have
no such operator on CPUs and keep the portable node.

GroupQueryAttention knows how many rows count (`seqlens_k`, the same number for every row of a
batch here) and no first row, so left padding is an additive bias, made once for all layers. A
query that is padding sees a mean of padding rows instead of 0; nothing real reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reattend.targets.onnx.functions import DOMAIN
from reattend.targets.onnx.kept_body import KEPT
from reattend.targets.onnx.linear_body import LINEAR
from reattend.targets.onnx.rewriting import attribute, forget, producer, take_over
from reattend.targets.onnx.selected_body import SELECTED

CONTRIB = "com.microsoft"
GROUP_QUERY = f"{CONTRIB}::GroupQueryAttention"
# Large enough that exp(-x) is 0, small enough that a score can be added in float16.
_HIDDEN = -30000.0
_HEADS_APART = [0, 2, 1, 3]
# Measured: kernels/bench/results/onnx_sparse.json.
_SPARSE = {
    "SparseAttention": "GroupQueryAttention has a window but no first tokens, its state keeps "
    "every row, and on a CPU its window saves no time",
    KEPT: "GroupQueryAttention's state keeps every row, and it sees no rows but a window's",
    "RoutedAttention": "no operator of ONNX Runtime leaves heads out for some tokens",
    "PatternAttention": "no operator of ONNX Runtime for CPUs gathers the rows that heads see",
}


@dataclass(frozen=True)
class Form:
    """What a head group became: `domain::name`, and why it is not what the flavour prefers."""

    op: str
    reason: str = ""


def group_queries(model: Any, ids: Any, mask: Any) -> dict[str, Form]:
    """Replace every `Attention` node that GroupQueryAttention can express.

    Args:
        model: an `onnx_ir.Model` as exported, changed in place.
        ids: the graph input [B, N], the new tokens.
        mask: the graph input [B, T], 1 for real tokens.

    Returns:
        State output of keys (or latent rows) -> the form its node has now.
    """
    found: dict[str, Form] = {}
    shared = _Shared(model, ids, mask)
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        state = state_output(node)
        why = _why_not(node)
        if not why:
            _replace(model, node, shared)
        op = f"{DOMAIN}::{node.op_type}" if why else GROUP_QUERY
        found[state] = Form(op, why)
    if any(form.op.startswith(CONTRIB) for form in found.values()):
        model.opset_imports[CONTRIB] = 1
    return found


def state_output(node: Any) -> str:
    """The name of the first state that belongs to a node of ours, as it is after the call."""
    if node.op_type in ("SparseAttention", KEPT, *SELECTED, *LINEAR):
        written = node.outputs[1]
    else:
        written = node.inputs[2 if node.op_type == "LatentAttention" or _follows(node) else 1]
    name: str = written.name
    return name


def _follows(node: Any) -> bool:
    """Whether it attends to the keys of another layer, and has values of its own."""
    key, value = (_layer(v.name) for v in node.inputs[1:3])
    return node.op_type == "Attention" and key != value


def _layer(state: str) -> str:
    """`state_out.3` of `state_out.3.key`; a group of heads within it counts."""
    return state.rpartition(".")[0]


def _why_not(node: Any) -> str:
    """The reason why GroupQueryAttention cannot stand for a node; empty if it can."""
    if node.op_type in _SPARSE:
        return _SPARSE[node.op_type]
    if node.op_type == "WindowLinearAttention":
        return "no operator of ONNX Runtime sums over a window and a state in one denominator"
    if node.op_type in ("LinearAttention", "GatedLinearAttention"):
        return "it is not softmax attention"  # see `contrib_linear.py`
    if node.op_type in SELECTED:
        return "no operator of ONNX Runtime for CPUs chooses keys"
    if node.op_type != "Attention":
        return "no operator of ONNX Runtime for CPUs reads latent rows faster than plain products"
    key, value = (producer(v) for v in node.inputs[1:3])
    if any(n is None or n.op_type != "TensorScatter" for n in (key, value)):
        return "its keys or values are not what was just written to a state"
    if any(_follows(u) for u in node.inputs[1].consumers() if u.domain == DOMAIN):
        return "GroupQueryAttention keeps the keys that it reads to itself, and other layers attend"
    width, value_width = (int(v.shape[-1]) for v in node.inputs[1:3])
    if width != value_width:
        return f"keys of width {width} and values of width {value_width}"
    if width % 8:
        return f"head width {width} is not a multiple of 8"
    if not attribute(node, "causal"):
        return "it is not causal"
    return ""


class _Shared:
    """Inputs that all nodes have in common, made once: lengths, their total, and the padding."""

    def __init__(self, model: Any, ids: Any, mask: Any) -> None:
        self.model, self.ids, self.mask = model, ids, mask
        self.made: dict[tuple[int, Any], tuple[Any, Any, Any]] = {}

    def inputs(self, node: Any) -> tuple[Any, Any, Any]:
        """(seqlens_k [B] int32, total int32 scalar, bias [B, 1, N, T]) for a node of ours."""
        import onnx_ir as ir

        length, kind = node.inputs[4], node.inputs[0].dtype
        if (id(length), kind) in self.made:
            return self.made[id(length), kind]
        integer = ir.DataType.INT32
        tape = ir.tape.Tape()

        def number(name: str, value: Any, dtype: Any) -> Any:
            return initializer(self.model, f"group_query.{name}.{kind.name}", value, dtype)

        one = number("one", 1, ir.DataType.INT64)
        last = tape.op("Sub", [length, one])
        lengths = tape.op("Cast", [last], {"to": integer})
        total = tape.op("Shape", [self.mask], {"start": 1, "end": 2})
        scalar = tape.op("Squeeze", [total])
        whole = tape.op("Cast", [scalar], {"to": integer})
        real = tape.op("Cast", [self.mask], {"to": ir.DataType.BOOL})
        shown, hidden = number("shown", 0.0, kind), number("hidden", _HIDDEN, kind)
        row = tape.op("Where", [real, shown, hidden])
        wide = tape.op("Unsqueeze", [row, number("axes", [1, 2], ir.DataType.INT64)])
        queries = tape.op("Shape", [self.ids], {"start": 1, "end": 2})
        ones = number("ones", [1, 1], ir.DataType.INT64)
        one_more = number("one_more", [1], ir.DataType.INT64)
        sizes = tape.op("Concat", [ones, queries, one_more], {"axis": 0})
        bias = tape.op("Expand", [wide, sizes])
        for i, made in enumerate(tape.nodes):
            made.outputs[0].name = f"group_query.{i}.{kind.name}"
        _insert_behind(self.model, [length, self.mask], list(tape.nodes))
        self.made[id(length), kind] = lengths, whole, bias
        return self.made[id(length), kind]


def _insert_behind(model: Any, values: list[Any], nodes: list[Any]) -> None:
    """Insert nodes as early as the values they read allow."""
    makers = {id(n) for v in values if (n := producer(v)) is not None}
    latest = [node for node in model.graph if id(node) in makers]
    if latest:
        model.graph.insert_after(latest[-1], nodes)
    else:  # inputs of the graph
        model.graph.insert_before(next(iter(model.graph)), nodes)


def initializer(model: Any, name: str, value: Any, dtype: Any) -> Any:
    """A constant of the graph, made once."""
    import numpy as np
    import onnx_ir as ir

    if name not in model.graph.initializers:
        array = np.array(value, dtype.numpy())
        model.graph.initializers.add(ir.val(name, const_value=ir.tensor(array, name=name)))
    return model.graph.initializers[name]


def _replace(model: Any, node: Any, shared: _Shared) -> None:
    import onnx_ir as ir

    lengths, total, bias = shared.inputs(node)
    key, value = (producer(v) for v in node.inputs[1:3])
    heads, groups = int(node.inputs[0].shape[1]), int(key.inputs[0].shape[1])
    rows = [flat(model, node, v) for v in (node.inputs[0], key.inputs[1], value.inputs[1])]
    window, cap = attribute(node, "sliding_window"), attribute(node, "softcap")
    attributes: dict[str, Any] = {
        "num_heads": heads, "kv_num_heads": groups, "scale": attribute(node, "scale"),
    }  # fmt: skip
    attributes |= {"local_window_size": window} if window else {}
    attributes |= {"softcap": cap} if cap else {}
    inputs = [*rows, key.inputs[0], value.inputs[0], lengths, total, None, None, None, bias]
    made = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3)
    model.graph.insert_before(node, made)
    for old, new in zip((key.outputs[0], value.outputs[0]), made.outputs[1:], strict=True):
        take_over(old, new)
    unflatten(model, node, made.outputs[0], heads)
    for written in (key, value):
        forget(model, written)


def flat(model: Any, node: Any, value: Any) -> Any:
    """A [B, heads, N, width] value as [B, N, heads * width], made before `node` if need be."""
    import onnx_ir as ir

    heads, width = int(value.shape[1]), int(value.shape[3])
    maker = producer(value)
    if _swaps_heads(maker):
        split = producer(maker.inputs[0])
        if split is not None and split.op_type == "Reshape":
            whole = split.inputs[0]
            if len(whole.shape) == 3 and whole.shape[2] == heads * width:
                return whole
    if maker is not None and maker.op_type == "RotaryEmbedding" and len(maker.inputs) == 3:
        rows = flat(model, node, maker.inputs[0])
        attributes = [*maker.attributes.values(), ir.AttrInt64("num_heads", heads)]
        turned = ir.Node("", "RotaryEmbedding", [rows, *maker.inputs[1:]], attributes)
        model.graph.insert_before(node, turned)
        return turned.outputs[0]
    moved = ir.node("Transpose", [value], {"perm": _HEADS_APART})
    sizes = initializer(model, "group_query.flat", [0, 0, -1], ir.DataType.INT64)
    joined = ir.node("Reshape", [moved.outputs[0], sizes])
    model.graph.insert_before(node, [moved, joined])
    return joined.outputs[0]


def unflatten(model: Any, node: Any, y: Any, heads: int) -> None:
    """Give what read a node's [B, H, N, e] the contrib operator's y, [B, N, H * e]."""
    import onnx_ir as ir

    moved = [use.node for use in node.outputs[0].uses()]
    if len(moved) == 1 and _swaps_heads(moved[0]):
        joined = [use.node for use in moved[0].outputs[0].uses()]
        if len(joined) == 1 and joined[0].op_type == "Reshape":
            shape = joined[0].outputs[0].shape
            if shape is not None and len(shape) == 3:
                take_over(joined[0].outputs[0], y)
                forget(model, joined[0])
                return
    sizes = initializer(model, f"group_query.heads.{heads}", [0, 0, heads, -1], ir.DataType.INT64)
    apart = ir.node("Reshape", [y, sizes])
    back = ir.node("Transpose", apart.outputs, {"perm": _HEADS_APART})
    model.graph.insert_before(node, [apart, back])
    take_over(node.outputs[0], back.outputs[0])
    forget(model, node)


def _swaps_heads(node: Any) -> bool:
    return (
        node is not None
        and node.op_type == "Transpose"
        and (list(attribute(node, "perm", [])) == _HEADS_APART)
    )


def skip_norms(model: Any) -> int:
    """Make the addition in front of an RMS norm part of it (SkipSimplifiedLayerNormalization).

    Args:
        model: an `onnx_ir.Model`, changed in place.

    Returns:
        The number of norms replaced.
    """
    import onnx_ir as ir

    count = 0
    for norm in [n for n in model.graph if n.op_type == "RMSNormalization" and not n.domain]:
        total = producer(norm.inputs[0])
        if total is None or total.op_type != "Add" or attribute(norm, "axis", -1) != -1:
            continue
        if not _same_rows(*total.inputs) or len(norm.inputs) != 2:
            continue
        made = ir.node(
            "SkipSimplifiedLayerNormalization", [*total.inputs, norm.inputs[1]],
            {"epsilon": attribute(norm, "epsilon", 1e-5)}, domain=CONTRIB, num_outputs=4,
        )  # fmt: skip
        model.graph.insert_before(total, made)
        take_over(norm.outputs[0], made.outputs[0])
        forget(model, norm)
        if total.graph is not None:
            take_over(total.outputs[0], made.outputs[3])
            forget(model, total)
        count += 1
    if count:
        model.opset_imports[CONTRIB] = 1
    return count


def _same_rows(first: Any, second: Any) -> bool:
    """Whether two values are [B, N, width] of one width; sizes that vary have no number here."""
    if first.shape is None or second.shape is None:
        return False
    shapes = [[d if isinstance(d, int) else None for d in v.shape] for v in (first, second)]
    return shapes[0] == shapes[1] and len(shapes[0]) == 3 and shapes[0][2] is not None
