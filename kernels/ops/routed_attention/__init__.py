"""`reattend::routed_attention`: attention that some heads compute for some queries only."""

from __future__ import annotations

from reattend.kernels.routed_attention.register import routed_attention

__all__ = ["routed_attention"]
