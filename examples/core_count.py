"""Count the softmax attention cores of a model by watching it run, not by reading its graph."""

from __future__ import annotations

from typing import Any

from reattend.corewatch import cores_by_module


def count_cores(model: Any, inputs: dict[str, Any]) -> int:
    """Attention cores that run in one call."""
    return cores_by_module(model, inputs).total()
