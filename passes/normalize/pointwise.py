"""A convolution over single tokens is a linear layer: `conv1d` of kernel 1, grouped or not."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from reattend.passes.base import GraphPass, Refusal, call, owned, replace_node
from reattend.passes.evaluate import parameter_only
from reattend.passes.normalize.forms import aten, is_op


class PointwiseToLinear(GraphPass):
    """conv1d(x [B, D, N], w [O, D / groups, 1]) -> linear on tokens, between transpositions."""

    name = "pointwise-to-linear"

    def match(self, gm: fx.GraphModule) -> Iterable[fx.Node]:
        """Convolutions of kernel 1 over a batch of sequences, with stored weights."""
        for node in gm.graph.nodes:
            if is_op(node, aten.conv1d) and node.args[0].meta["val"].dim() == 3:
                weight = node.args[1]
                if parameter_only(weight) and weight.meta["val"].shape[-1] == 1:
                    yield node

    def check(self, gm: fx.GraphModule, node: fx.Node) -> Refusal | None:
        """Every token must be read once, and nothing else."""
        _, _, _, stride, padding, _, _ = _arguments(node)
        if stride not in (1, [1]) or padding not in (0, [0], "valid", "same"):
            return Refusal("a convolution that leaves tokens out or adds some")
        return None

    def rewrite(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """The layer, its groups as blocks of one matrix."""
        x, weight, bias, _, _, _, groups = _arguments(node)
        with gm.graph.inserting_before(node):
            matrix = call(gm, aten.squeeze.dim, weight, -1)
            if groups > 1:
                parts = call(gm, aten.chunk.default, matrix, groups)
                blocks = [call(gm, operator.getitem, parts, i) for i in range(groups)]
                matrix = gm.graph.call_function(aten.block_diag.default, (blocks,))
                matrix.meta["val"] = torch.block_diag(*[b.meta["val"] for b in blocks])
            made = (u for u in x.users if is_op(u, aten.transpose) and u.args[1:] == (1, 2))
            tokens = next((u for u in made if u < node), None)
            tokens = tokens or call(gm, aten.transpose.int, x, 1, 2)
            new = call(gm, aten.linear.default, tokens, matrix, bias)
            back = call(gm, aten.transpose.int, new, 1, 2)
        owned(back, node)
        replace_node(node, back)


def _arguments(node: fx.Node) -> list[Any]:
    """Input, weight, bias, stride, padding, dilation and groups."""
    rest = [None, None, None, 1, 0, 1, 1]
    return [*node.args, *rest[len(node.args) :]]
