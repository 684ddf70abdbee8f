"""Models on an accelerator: found through a copy on the CPU, run where they are.

Probes compare values of the graph with values they make themselves, at two lengths and with
padding; on one device there is one answer, and the device's own memory stays free.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lies; the CPU for a model without tensors."""
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    return CPU if first is None else first.device


def on_host(model: nn.Module) -> nn.Module:
    """The model itself if it is on the CPU (or has no data yet), else a copy of it there."""
    if device_of(model).type in ("cpu", "meta"):
        return model
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved: Tensor = tensor.detach().to(CPU)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, tensor.requires_grad)
        memo[id(tensor)] = moved
    return copy.deepcopy(model, memo)


def inputs_on_host(inputs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Example inputs on the CPU."""
    if inputs is None:
        return None
    return {k: v.to(CPU) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def beside(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments on the device of the model's first tensor."""
    device = device_of(model)
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
