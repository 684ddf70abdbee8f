"""`reattend::linear_attention`: attention without softmax, over a state of constant size."""

from __future__ import annotations

from reattend.kernels.linear_attention.register import linear_attention

__all__ = ["linear_attention"]
