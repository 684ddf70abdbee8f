"""Models without weights: every parameter a stand-in of the right shape that takes no memory.

What a block computes is read from the graph, not from its weights. A stand-in is a tensor on the
CPU whose entry (i, j) is number i + j of one short random vector, so that values can still be
told apart, and a 7B model takes less than a megabyte. Buffers are real: tables of frequencies and
of positions are part of what is computed.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from reattend.errors import ModelError
from reattend.inputs import is_hf

META = torch.device("meta")
_SEED = 7


def is_meta(model: nn.Module) -> bool:
    """Whether some weight has no data."""
    return any(p.device == META for p in model.parameters())


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device that runs: stand-ins for weights, buffers filled in.

    Raises:
        ModelError: a buffer has no data, and nothing says how to make it.
    """
    memo: dict[int, Any] = {}
    for number, parameter in enumerate(model.parameters()):
        if parameter.device == META:
            made = nn.Parameter(stand_in(parameter, _SEED + number), requires_grad=False)
            memo[id(parameter)] = made
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if any(b.device == META for b in buffers.values()):
        known = _filled_buffers(model)
        for name, buffer in buffers.items():
            if buffer.device == META:
                memo[id(buffer)] = known[name]
    return copy.deepcopy(model, memo).eval()


def stand_in(like: Tensor, seed: int) -> Tensor:
    """A tensor of `like`'s shape and dtype in memory that does not grow with it."""
    if not like.is_floating_point():
        return torch.zeros(1, dtype=like.dtype).expand(like.shape)
    generator = torch.Generator().manual_seed(seed)
    length = sum(like.shape) - like.dim() + 1
    scale = (like.shape[-1] if like.dim() > 1 else 1) ** -0.5
    row = torch.randn(length, generator=generator) * scale
    if like.dim() == 1:
        row = 1 + row / 10
    stand: Tensor = row.to(like.dtype).as_strided(like.shape, [1] * like.dim())
    return stand


def _filled_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers as the class makes them from its config."""
    if not is_hf(model):
        name = next(n for n, b in model.named_buffers() if b.device == META)
        raise ModelError(
            "a buffer of the model has no data",
            where=f"{type(model).__name__}, {name}",
            why="it is on the meta device, and what it holds is part of what the model computes",
            next_step="build the module with its parameters on the meta device and its buffers on "
            "the CPU (accelerate.init_empty_weights())",
        )
    return dict(empty(type(model), model.config).named_buffers(remove_duplicate=False))


def empty(model_class: Any, config: Any) -> nn.Module:
    """A transformers model without weights: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        make = getattr(model_class, "_from_config", None) or model_class.from_config  # Auto classes
        made: nn.Module = make(config)
    return made.eval()
