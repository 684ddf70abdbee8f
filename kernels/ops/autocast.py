"""Autocast for the ops, in the dtype the user's autocast region asks for.

`torch.library.register_autocast` fixes the dtype when the op is registered and takes no
keyword-only arguments, so the rule is registered one level lower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("reattend", "FRAGMENT")


def to_autocast_dtype(*arguments: Any) -> tuple[Any, ...]:
    """Cast float tensors (fp64 excepted) to the dtype of the active autocast region."""
    done: list[Any] = []
    for x in arguments:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            done.append(x)
        else:
            done.append(x.to(torch.get_autocast_dtype(x.device.type)))
    return tuple(done)


def register_autocast(name: str, cast: Callable[..., tuple[Any, ...]] = to_autocast_dtype) -> None:
    """Make ``reattend::<name>`` cast its tensor arguments inside autocast regions.

    Args:
        name: name of the op without namespace.
        cast: takes the positional arguments, returns them cast.
    """
    for key in ("AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl(name, _kernel(name, key, cast), key, with_keyset=True)


def _kernel(name: str, key: str, cast: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    op = getattr(torch.ops.reattend, name).default
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(_keys: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*cast(*args), **kwargs)

    return kernel
