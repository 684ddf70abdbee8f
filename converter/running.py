"""A model at work: which of its modules run at this moment, and in which mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def running_modules(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the running submodules, the innermost last; kept up to date by hooks.

    After an error the list still ends with the module that raised it.
    """
    running: list[str] = []
    handles = []
    for path, module in model.named_modules():

        def enter(_m: nn.Module, _args: Any, path: str = path) -> None:
            running.append(path)

        def leave(_m: nn.Module, _args: Any, _out: Any, path: str = path) -> None:
            while running and running.pop() != path:  # a caught error inside left some behind
                continue

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode, restored afterwards module by module."""
    modes = {m: m.training for m in model.modules()}
    for module in modes:  # a captured graph has no eval()
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
