"""Which modules compute softmax attention: watched while a model runs, not read off its graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reattend.running import running_modules

aten = torch.ops.aten
_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)
_FUSED = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
)  # fmt: skip
_PRODUCT = (aten.bmm.default, aten.mm.default, aten.baddbmm.default)
#: what may happen to probabilities before they average values
_PASS_ON = (
    "view", "_unsafe_view", "reshape", "expand", "transpose", "permute", "slice", "clone",
    "_to_copy", "nan_to_num", "mul", "native_dropout", "unsqueeze", "squeeze", "t", "where",
    "masked_fill", "constant_pad_nd", "sub", "select", "split", "alias", "detach", "contiguous",
    "_reshape_alias", "split_with_sizes", "unbind", "lift_fresh", "copy",
)  # fmt: skip
#: products with a weight end what scores are
_LAYERS = (*_PRODUCT, aten.addmm.default, aten.convolution.default)


class _Watch(TorchDispatchMode):
    """Follows every softmax of scores; a result that enters a matrix product is an attention core.

    Scores are made of a product of two activations, not of a layer: a softmax over what a layer
    says (the kernel of a dynamic convolution, the weights of a pooling) is no attention.
    """

    def __init__(self, running: list[str], weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running, self.weights = running, weights
        self.scores: set[int] = set()
        self.shifts: set[int] = set()  # made of a logsumexp: their exp is a softmax
        self.fused: list[str] = []
        self.paths: list[str] = []  # of every softmax
        self.roots: dict[int, int] = {}
        self.alive: list[Tensor] = []
        self.averaged: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        scored = any(id(a) in self.scores for a in given)
        if func in _LAYERS:
            scored = func in _PRODUCT and not any(_storage(a) in self.weights for a in given)
        shifted = name == "logsumexp" or (
            name in _PASS_ON and any(id(a) in self.shifts for a in given)
        )
        for made in tree_leaves(out) if scored or shifted else ():
            if isinstance(made, Tensor):
                self.alive.append(made)
                self.scores |= {id(made)} if scored else set()
                self.shifts |= {id(made)} if shifted else set()
        if name in _FUSED:
            self.fused.append(self._path())
        elif func in _SOFTMAX or (name == "exp" and id(given[0]) in self.shifts):
            if id(given[0]) in self.scores:
                self._mark(out, len(self.paths))
                self.paths.append(self._path())
        else:
            roots = {self.roots[id(a)] for a in given if id(a) in self.roots}
            if roots and func in _PRODUCT:
                self.averaged |= roots
            elif roots and name in _PASS_ON:
                for made in tree_leaves(out):
                    if isinstance(made, Tensor):
                        self._mark(made, min(roots))
        return out

    def _path(self) -> str:
        return self.running[-1] if self.running else ""

    def _mark(self, tensor: Tensor, root: int) -> None:
        self.alive.append(tensor)  # an id stays that tensor's while it lives
        self.roots[id(tensor)] = root


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@torch.no_grad()
def cores_by_module(model: nn.Module, inputs: dict[str, Any]) -> Counter[str]:
    """Attention cores of one call, by the path of the smallest module that computes each.

    A core is a fused call, or a softmax of scores that averages values. A router's softmax scales
    or selects and is none; a linear attention has no softmax.
    """
    weights = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    with running_modules(model) as running, _Watch(running, weights) as seen:
        model(**inputs)
    return Counter([*seen.fused, *(seen.paths[i] for i in seen.averaged)])
