"""One short run of a model with every module's tensors recorded: who passes what to whom.

Modules are told apart by the tensors they pass on, never by their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

#: rounding of a type, times this, is how close two equal values lie
SLACK = 8.0
TOKENS = 7


@dataclass
class Call:
    """One call of a module: its tensor arguments, its first result, and how often it was called."""

    inputs: list[Tensor]
    output: Tensor | None
    times: int = 1


@dataclass
class Trace:
    """Token ids, calls by module path in the order in which the modules finished, and logits."""

    ids: Tensor
    calls: dict[str, Call] = field(default_factory=dict)
    logits: Tensor | None = None

    def reading(self, tensor: Tensor, inside: str = "") -> list[str]:
        """Paths below `inside` that were given this very tensor."""
        return [
            path
            for path, call in self.calls.items()
            if path.startswith(inside) and any(same(tensor, x) for x in call.inputs)
        ]

    def giving(self, tensor: Tensor, inside: str = "") -> list[str]:
        """Paths below `inside` whose result is this very tensor."""
        return [
            path
            for path, call in self.calls.items()
            if path.startswith(inside) and call.output is not None and same(tensor, call.output)
        ]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen alike."""
    alike = one.shape == other.shape and one.stride() == other.stride()
    return alike and one.data_ptr() == other.data_ptr()


def close(one: Tensor, other: Tensor) -> bool:
    """Equal to the rounding of their type."""
    if one.shape != other.shape:
        return False
    room = SLACK * torch.finfo(one.dtype).eps * float(other.abs().max().clamp_min(1e-30))
    return float((one - other).abs().max()) <= room


def multiple(one: Tensor, other: Tensor) -> float | None:
    """The f with one = f * other, to rounding; None where there is none."""
    if one.shape != other.shape:
        return None
    a, b = one.double(), other.double()
    factor = float((a * b).sum() / (b * b).sum().clamp_min(1e-300))
    if abs(factor - 1) < 64 * torch.finfo(one.dtype).eps and close(one, other):
        return 1.0
    return factor if close(one, (factor * b).to(one.dtype)) else None


def summed(total: Tensor, base: Tensor, part: Tensor) -> float | None:
    """The f with total = base + f * part, to rounding; None where there is none."""
    if total.shape != base.shape or total.shape != part.shape:
        return None
    if close(total, base + part):
        return 1.0
    wide = part.double()
    factor = float(((total - base).double() * wide).sum() / wide.square().sum().clamp_min(1e-300))
    return factor if factor and close(total, (base + factor * part).to(total.dtype)) else None


def within(path: str, module: str) -> bool:
    """Whether a path is a module or lies inside of it."""
    return path == module or path.startswith(f"{module}.")


def record(model: nn.Module) -> Trace:
    """Run a decoder on a few tokens."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(11)
    words = int(config.get_text_config().vocab_size)
    ids = torch.randint(0, words, (1, TOKENS), generator=generator)
    trace = Trace(ids.to(next(model.parameters()).device))
    with torch.no_grad(), _hooked(model, trace):
        result = model(input_ids=trace.ids, use_cache=False)
    trace.logits = result.logits
    return trace


@contextmanager
def _hooked(model: nn.Module, trace: Trace) -> Iterator[None]:
    def hook(path: str) -> Any:
        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if path in trace.calls:
                trace.calls[path].times += 1
                return
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            first = output[0] if isinstance(output, tuple | list) and output else output
            trace.calls[path] = Call(given, first if isinstance(first, Tensor) else None)

        return after

    handles = [
        module.register_forward_hook(hook(path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
