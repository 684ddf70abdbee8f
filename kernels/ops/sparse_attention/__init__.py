"""`reattend::sparse_attention`: attention that reads the key blocks a layout lists."""

from __future__ import annotations

from reattend.kernels.sparse_attention.layout import BlockLayout
from reattend.kernels.sparse_attention.register import sparse_attention

__all__ = ["BlockLayout", "sparse_attention"]
