"""A model at work: which of its modules run at this moment, and in which mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reattend.inputs import is_hf


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
    """Eval mode, restored afterwards module by module.

    torch's own attention modules then take one fused call for a whole layer, which a graph shows
    as one node; here they compute step by step.
    """
    modes = {m: m.training for m in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    for module in modes:  # a captured graph has no eval()
        module.training = False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Caching off by the configs of a transformers model, for one that has no argument for it."""
    configs = [] if not is_hf(model) else [model.config, model.config.get_text_config()]  # type: ignore[union-attr, operator]
    before = [(c, c.use_cache) for c in configs if getattr(c, "use_cache", None)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
