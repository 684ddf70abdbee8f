"""Count the softmax attention cores of a model by watching it run, not by reading its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from reattend.corewatch import cores_by_module


def count_cores(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Attention cores that run in one call, and that what it returns depends on.

    A classifier may carry a pooling head whose result nobody reads (Siglip): no graph holds it.
    """
    ran = cores_by_module(model, inputs)
    return sum(count for path, count in ran.items() if not path or _read(model, inputs, path))


@torch.no_grad()
def _read(model: nn.Module, inputs: dict[str, Any], path: str) -> bool:
    """Whether the model returns something else where one module does."""

    def spoiled(_module: nn.Module, _args: Any, out: Any) -> Any:
        return tree_map(lambda t: torch.randn_like(t) if _floats(t) else t, out)

    before = [t for t in tree_leaves(model(**inputs)) if _floats(t)]
    with model.get_submodule(path).register_forward_hook(spoiled):
        after = [t for t in tree_leaves(model(**inputs)) if _floats(t)]
    return not all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)
    )


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
