"""What a capture switches on a model and on torch is as it was afterwards, also after an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import zoo_models
from torch import nn

from reattend.running import evaluation, running_modules, uncached
from reattend.tracing import _settled


def state(model: nn.Module) -> list[Any]:
    return [
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        model.config.use_cache,  # type: ignore[union-attr]
        torch.backends.mha.get_fastpath_enabled(),
        nn.Module.to,
    ]


@pytest.mark.parametrize(
    "switch", [evaluation, uncached, running_modules, lambda _: _settled()],
    ids=["evaluation", "uncached", "running", "settled"],
)  # fmt: skip
def test_what_is_switched_is_switched_back(
    switch: Callable[[nn.Module], AbstractContextManager[Any]],
) -> None:
    model = zoo_models.build("llama").train()
    model.model.layers[1].eval()
    model.config.use_cache = True
    before, inside = state(model), []

    def fails() -> None:
        inside.append(state(model))
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), switch(model):
        fails()
    assert inside != [before]
    assert state(model) == before


def test_a_module_that_has_its_dtype_is_not_converted_again() -> None:
    layer = nn.Linear(2, 2)
    with _settled():
        assert layer.to(torch.float32) is layer
        assert layer.to(torch.float64).weight.dtype == torch.float64
