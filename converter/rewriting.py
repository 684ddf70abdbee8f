"""Swap the chosen blocks in a copy of the model that shares every unchanged tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from reattend.inputs import is_hf
from reattend.install.adapter import install, replace_module
from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.base import Built
from reattend.preflight import Choice
from reattend.weights import build_dense


@dataclass
class Rewritten:
    """The converted model and what was built for each site, by path."""

    model: nn.Module
    built: dict[str, Built] = field(default_factory=dict)


def lookup(model: nn.Module) -> Callable[[str], Tensor]:
    """Parameters of a model by name, tied names included."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return lambda name: tensors[name].detach()


def normal_forms(model: nn.Module, choices: list[Choice]) -> dict[str, DenseAttention]:
    """The normal form of every site that is converted; identity gathers share storage."""
    read = lookup(model)
    return {
        c.site.path: build_dense(c.site.spec, read, c.site.hidden_size, c.site.memory_size)
        for c in choices
        if c.action == "converted"
    }


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree; parameters and buffers are the same storage.

    Parameters become new objects, so that training or freezing the copy's flags leaves the
    original's alone; a stage that trains a shared tensor clones it first.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def rewrite(
    model: nn.Module,
    choices: list[Choice],
    statistics: dict[str, Any],
    *,
    inplace: bool = False,
    progress: Callable[[Choice, int, int], None] | None = None,
) -> Rewritten:
    """Build every mixer and swap its owner.

    Args:
        model: the original.
        choices: from `preflight`.
        statistics: by site path, what the conversions asked for.
        inplace: change `model` itself.
        progress: (choice, done, total) after each site.
    """
    forms = normal_forms(model, choices)
    target = model if inplace else shared_copy(model)
    result = Rewritten(target)
    converted = [c for c in choices if c.action == "converted"]
    for number, choice in enumerate(converted, 1):
        path = choice.site.path
        assert choice.conversion is not None
        built = choice.conversion.build(forms.pop(path), statistics.get(path), choice.options)
        owner = target.get_submodule(path)
        replace_module(target, path, install(owner, built.mixer, choice.site.binding))
        result.built[path] = built
        if progress is not None:
            progress(choice, number, len(converted))
    if is_hf(target):
        from reattend.targets.huggingface import adopt

        adopt(target)
    return result
