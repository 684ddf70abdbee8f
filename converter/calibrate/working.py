"""Working copies: float32 masters of what is trained, shared storage for everything else.

The caller's models are never written while training runs. What is trained is a float32 (or
float64) clone; what is frozen shares the caller's storage, or one widened copy where the
checkpoint is bf16 or fp16, common to teacher and student. So the working set is, in bytes, 4 per
frozen parameter of a half-precision model (0 otherwise), and 16 per trained one (master,
gradient, two AdamW moments). At the end the masters are rounded into *new* parameters: storage
the student shares with the original is left alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibrate.sites import projection_of
from reattend.errors import ArgumentError
from reattend.install.adapter import Adapter
from reattend.mixers.base import Mixer
from reattend.sharing import address

_NARROW = (torch.bfloat16, torch.float16)


@dataclass
class Working:
    """Teacher and student as they are trained.

    Attributes:
        teacher: frozen, evaluation mode.
        student: evaluation mode (no dropout), gradients only on `masters`.
        masters: full parameter name -> float32 master weight.
        names: id of a caller's parameter -> its name in `masters`.
    """

    teacher: nn.Module
    student: nn.Module
    masters: dict[str, nn.Parameter]
    names: dict[int, str] = field(default_factory=dict)


def mixer_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """Every floating-point parameter of a mixer and its projection, by full name, each once.

    Raises:
        ArgumentError: the model has no mixer.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    mixers = [path for path, module in student.named_modules() if isinstance(module, Mixer)]
    beside = [projection_of(student, m) for m in student.modules() if isinstance(m, Adapter)]
    for path in [*mixers, *filter(None, beside)]:
        for name, parameter in student.get_submodule(path).named_parameters():
            if id(parameter) not in seen and parameter.is_floating_point():
                seen.add(id(parameter))
                found[f"{path}.{name}"] = parameter
    if not mixers:
        raise ArgumentError(
            "there is nothing to calibrate: the model has no converted attention block",
            where=type(student).__name__,
            next_step='convert it first (plan="identity" prepares the dense model)',
        )
    return found


def working_copies(teacher: nn.Module, student: nn.Module) -> Working:
    """Copies to train on; no storage of the caller's will be written.

    Args:
        teacher: the original.
        student: a model with mixers; may share parameters with the teacher.

    Raises:
        ArgumentError: no mixer, or a model that accelerate has spread over devices.
    """
    _refuse_dispatched(teacher, student)
    shared: dict[Any, Tensor] = {}
    masters: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}
    for name, parameter in mixer_parameters(student).items():
        masters[name] = nn.Parameter(_wide(parameter.detach()).clone())
        names[id(parameter)] = name
    for model, trained in ((teacher, False), (student, True)):
        memo: dict[int, Any] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            if trained and id(tensor) in names:
                memo[id(tensor)] = masters[names[id(tensor)]]
                continue
            key = (address(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if address(tensor) == 0 or key not in shared:
                shared[key] = _wide(tensor.detach())
            plain = shared[key]
            frozen = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(plain, requires_grad=False) if frozen else plain
        copied = copy.deepcopy(model, memo).eval()
        if trained:
            student = copied
        else:
            teacher = copied
    return Working(teacher, student, masters, names)


def write_back(student: nn.Module, working: Working) -> list[str]:
    """Round the masters into new parameters of the caller's student.

    A parameter whose rounded value did not change keeps its old, possibly shared, tensor.

    Returns:
        The names that changed.
    """
    changed: dict[int, nn.Parameter] = {}
    for parameter in mixer_parameters(student).values():
        name = working.names[id(parameter)]
        new = working.masters[name].detach().to(parameter.dtype)
        if not torch.equal(new, parameter.detach()):
            fresh = new.clone() if address(new) == address(working.masters[name]) else new
            changed[id(parameter)] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
    for module in student.modules():
        for name, held in list(module._parameters.items()):
            if held is not None and id(held) in changed:
                module._parameters[name] = changed[id(held)]
    return sorted(working.names[key] for key in changed)


def _refuse_dispatched(*models: nn.Module) -> None:
    """A dispatched module's `forward` is bound to the module itself; its copy would run it."""
    for model in models:
        for path, module in model.named_modules():
            if hasattr(module, "_hf_hook"):
                raise ArgumentError(
                    "a model spread over devices by accelerate cannot be calibrated",
                    where=path or type(model).__name__,
                    next_step="load it on one device (without device_map)",
                )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _NARROW else tensor
