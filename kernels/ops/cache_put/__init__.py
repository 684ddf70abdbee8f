"""`reattend::cache_put`: write new rows into a cache of fixed capacity, at one place per row."""

from __future__ import annotations

from reattend.kernels.cache_put.reference import cache_put_
from reattend.kernels.cache_put.register import cache_put

__all__ = ["cache_put", "cache_put_"]
