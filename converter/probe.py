"""One short forward pass of the original, timed, with what a backward pass would keep counted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reattend.host import beside
from reattend.running import evaluation
from reattend.sharing import address

#: Passes that are timed at most, and seconds after which two are enough.
PASSES, ENOUGH = 8, 0.3


@dataclass(frozen=True)
class Probe:
    """What was measured on `tokens` tokens.

    Attributes:
        tokens: real tokens of the pass.
        seconds: of a forward pass per token, the best of a few.
        saved: numbers per token that autograd keeps when the attention blocks are trained and
            nothing else is.
    """

    tokens: int
    seconds: float
    saved: float


def probe(model: nn.Module, inputs: dict[str, Any], trained: list[str]) -> Probe:
    """Run the model a few times on one row.

    Args:
        model: the original; flags and mode are restored.
        inputs: keyword arguments; the first row is used if it can be run alone.
        trained: paths of the blocks that a calibration would train.
    """
    inputs = beside(model, inputs)
    row = {k: v[:1] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
    try:
        with evaluation(model), torch.no_grad():
            model(**row)
    except (RuntimeError, AssertionError, ValueError, IndexError):  # rows that belong together
        row = inputs
    first = next(v for v in row.values() if isinstance(v, Tensor) and v.dim())
    tokens = max(1, first.shape[1] if first.dim() > 1 and not first.is_floating_point() else 1)
    passes: list[float] = []
    with evaluation(model), torch.no_grad():
        while len(passes) < 2 or (len(passes) < PASSES and sum(passes) < ENOUGH):
            begin = time.perf_counter()
            model(**row)
            passes.append(time.perf_counter() - begin)
    return Probe(tokens, min(passes) / tokens, _saved(model, row, trained) / tokens)


def _saved(model: nn.Module, row: dict[str, Any], trained: list[str]) -> int:
    """Numbers kept for the backward pass; weights do not count."""
    weights = {address(t) for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(given: Tensor) -> Tensor:
        tensor = given.detach()  # a graph that holds its own outputs would never be freed
        storage = tensor.untyped_storage()
        if address(tensor) not in weights and tensor.is_floating_point():
            kept.setdefault(storage._cdata, storage.nbytes() // tensor.element_size())
            alive.append(tensor)
        return tensor

    with (
        evaluation(model),
        _training_only(model, trained),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model(**row)
    del output
    alive.clear()
    return sum(kept.values())


@contextmanager
def _training_only(model: nn.Module, paths: list[str]) -> Iterator[None]:
    """Gradients for the parameters below `paths` and for no others, inside."""
    flags = {p: p.requires_grad for p in model.parameters()}
    wanted = {id(p) for path in paths for p in model.get_submodule(path).parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in wanted and parameter.is_floating_point())
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
