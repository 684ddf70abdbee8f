"""How tokens spread over the heads that routers choose from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from reattend.install.adapter import Adapter
from reattend.mixers.routed import RoutedAttention
from reattend.mixers.router import Router, Routes


@contextmanager
def head_use(model: nn.Module, real_BN: Tensor | None) -> Iterator[dict[str, tuple[float, ...]]]:
    """Filled while converted blocks run: by site path, the share of tokens that use each unit.

    Units are query heads or KV groups, in the block's own order; shared ones are left out.

    Args:
        model: the converted model; its blocks are called once each.
        real_BN: tokens that count; None: all.
    """
    found: dict[str, tuple[float, ...]] = {}
    handles = []
    for path, module in model.named_modules():
        if not isinstance(module, Adapter):
            continue
        for mixer in module.mixer.head_groups:
            if isinstance(mixer, RoutedAttention) and mixer.config.top_k < mixer.config.routed:
                hook = partial(_count, found, path, real_BN)
                handles.append(mixer.router.register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _count(
    found: dict[str, tuple[float, ...]], path: str, real_BN: Tensor | None, router: Router,
    given: Any, routes: Routes,
) -> None:  # fmt: skip
    assert routes.active_BUN is not None  # some are left out
    used_BNR = routes.active_BUN[:, router.config.shared :].transpose(1, 2)
    whole = real_BN is None or real_BN.shape != used_BNR.shape[:2]
    used = used_BNR.flatten(0, 1) if whole else used_BNR[real_BN]
    shares = used.double().mean(0).tolist()
    found[path] = (*found.get(path, ()), *shares)
