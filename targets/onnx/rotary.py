"""Each spelled-out rotation becomes the standard RotaryEmbedding: one kernel, not eight.

The mixers turn the first 2P dimensions of a head, [real | imaginary | rest], by tables of shape
[B, N, P] (`reattend.mixers.rotary.rotate`). That is what RotaryEmbedding of opset 23 does when it
is not interleaved and gets no position ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reattend.targets.onnx.rewriting import attribute, constant, producer, replace_value


@dataclass(frozen=True)
class _Turn:
    x: Any
    cos: Any
    sin: Any
    pairs: int
    rest: bool


def fuse_rotary(model: Any) -> int:
    """Replace rotations of [B, heads, N, width] tensors.

    Args:
        model: an `onnx_ir.Model` of opset 23 or later, changed in place.

    Returns:
        The number of rotations replaced.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        turn = _turn(node)
        if turn is None:
            continue
        width = {"rotary_embedding_dim": 2 * turn.pairs} if turn.rest else {}
        made = ir.node("RotaryEmbedding", [turn.x, turn.cos, turn.sin], width)
        replace_value(model, node.outputs[0], made)
        count += 1
    return count


def _turn(node: Any) -> _Turn | None:
    """What a Concat(real', imaginary'[, rest]) rotates, if that is what it is."""
    if node.op_type != "Concat" or node.domain or len(node.inputs) not in (2, 3):
        return None
    less, more = (producer(value) for value in node.inputs[:2])
    if less is None or more is None or (less.op_type, more.op_type) != ("Sub", "Add"):
        return None
    (real, cos), (imaginary, sin), second, third = (
        _product(value) for value in (*less.inputs, *more.inputs)
    )
    if real is None or second != (imaginary, cos) or third != (real, sin):
        return None
    (x, start, pairs), *others = (_columns(value) for value in (real, imaginary, *node.inputs[2:]))
    if x is None or start != 0 or any(other[0] is not x for other in others):
        return None
    width, rest = x.shape[-1], len(others) == 2
    if not isinstance(width, int) or attribute(node, "axis") not in (-1, 3):
        return None
    spans = [(begin, min(end, width)) for _, begin, end in others]
    if spans != [(pairs, 2 * pairs), (2 * pairs, width)][: len(others)]:
        return None
    if not rest and width != 2 * pairs:
        return None
    tables = [_table(cos), _table(sin)]
    return None if None in tables else _Turn(x, tables[0], tables[1], pairs, rest)


def _product(value: Any) -> tuple[Any, Any]:
    """(part of x, table) of part * table, in either order; nothing if it is not that."""
    node = producer(value)
    if node is None or node.op_type != "Mul":
        return None, None
    first, second = node.inputs
    return (first, second) if _columns(first)[0] is not None else (second, first)


def _columns(value: Any) -> tuple[Any, int, int]:
    """(x, start, end) where the value is x[..., start:end] of a 4-D x; no x if it is not that."""
    node, nothing = producer(value), (None, 0, 0)
    if node is None or node.op_type != "Slice" or len(node.inputs) < 4:
        return nothing
    numbers = [constant(v) or [] for v in node.inputs[1:]]
    if any(len(n) != 1 for n in numbers):
        return nothing
    start, end, axis, *step = (n[0] for n in numbers)
    x = node.inputs[0]
    if x.shape is None or len(x.shape) != 4 or axis not in (3, -1) or step not in ([], [1]):
        return nothing
    return (x, start, end) if start >= 0 and end >= 0 else nothing


def _table(value: Any) -> Any:
    """The [B, N, P] tensor below an Unsqueeze over heads; one of batch 1 does not fit the op."""
    node = producer(value)
    if node is None or node.op_type != "Unsqueeze" or constant(node.inputs[1]) != [1]:
        return None
    table = node.inputs[0]
    if table.shape is None or len(table.shape) != 3 or table.shape[0] == 1:
        return None
    return table
