"""What a value on the way from the softmax back to q k^T is: a number, a weight, a mask's fill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.passes.evaluate import Evaluator, ancestors, attribute, parameter_only
from reattend.passes.normalize.forms import aten, is_op

CASTS = (
    aten.to, aten._to_copy, aten.type_as, aten.dropout, aten.clone, aten.nan_to_num,
    aten.contiguous,
)  # fmt: skip
RESHAPES = (aten.view, aten.reshape, aten.unflatten, aten.flatten)
_LOWEST = -1e4


def number(gm: fx.GraphModule, value: object) -> float | None:
    """A Python number, or a stored constant of one element that is not a parameter."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node) or not weight(value):
        return None
    shape = value.meta.get("val")
    if not isinstance(shape, Tensor) or shape.dim() > 1 or shape.numel() != 1:
        return None
    names = [str(n.target) for n in ancestors([value]) if n.op == "get_attr"]
    if any(isinstance(attribute(gm, name), nn.Parameter) for name in names):
        return None
    return float(Evaluator(gm, promote=torch.float64).run([value], {})[0])


def weight(node: object) -> bool:
    """Whether it is made of stored tensors alone."""
    return isinstance(node, fx.Node) and parameter_only(node)


def per_row(node: object) -> bool:
    """A weight with one factor per head or query, the same for all keys."""
    if not weight(node):
        return False
    shape = node.meta["val"].shape  # type: ignore[attr-defined]
    return len(shape) == 0 or shape[-1] == 1


def low(gm: fx.GraphModule, value: object) -> bool:
    """Whether a fill value hides a score."""
    found = number(gm, value)
    return found is not None and found <= _LOWEST


def is_max_of(node: object, scores: object) -> bool:
    """max(scores, -1, keepdim): softmax does not see the shift."""
    while is_op(node, *CASTS):
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "call_function":
        if "getitem" in str(node.target) and node.args[1] == 0:
            node = node.args[0]
        if is_op(node, aten.amax, aten.max) and node.args[0] is scores:
            return True
    return False


def heads_of(node: object) -> int:
    """H where a value is [B, H, N, M], 0 where it is not."""
    value = getattr(node, "meta", {}).get("val")
    if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(value.shape[1], int):
        return 0
    return int(value.shape[1])


def refolds(node: fx.Node) -> bool:
    """Whether a reshape only folds heads into the batch or takes them out again."""
    source: Any = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    tails = [str(s) for s in before[-2:]] == [str(s) for s in after[-2:]]
    return tails and {len(before), len(after)} <= {3, 4}
