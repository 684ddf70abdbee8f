"""`reattend::attention`: grouped-query softmax attention over a cache with per-row lengths."""

from __future__ import annotations

from reattend.kernels.attention.register import attention

__all__ = ["attention"]
