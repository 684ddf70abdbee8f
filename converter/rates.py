"""How fast this machine multiplies, measured on the spot."""

from __future__ import annotations

import time

import torch


def speed(dtype: torch.dtype) -> float:
    """Floating-point operations per second of one product on this machine, best of three."""
    a = torch.ones(256, 512, dtype=dtype)
    b = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    return 2.0 * 256 * 512 * 512 / max(best, 1e-6)
