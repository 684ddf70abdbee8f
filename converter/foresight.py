"""Large checkpoints: what a plan refuses for shapes alone is said before any weight is read.

Reading the weights of a model of 7B and proving its blocks takes minutes, its graph seconds. What a
conversion refuses depends on the specs, which the graph shows; what could not prove itself is
refused later, by the preflight of the model with its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reattend.errors import ReattendError, RefusedError
from reattend.finder import find_attention
from reattend.plan import Plan
from reattend.preflight import choose, enforce
from reattend.source_empty import open_empty
from reattend.source_load import home_of

#: Bytes of weight files from which looking twice takes less than being refused late.
LARGE = 2 << 30


def is_large(model: Any) -> bool:
    """Whether this names a checkpoint whose weights take long to read."""
    if not isinstance(model, str | Path):
        return False
    try:
        files = home_of(str(model)).glob("*.safetensors")
    except ReattendError:  # opening it says what is wrong
        return False
    return sum(file.stat().st_size for file in files) >= LARGE


def foresee(
    model: str | Path, plan: Plan, inputs: dict[str, Any] | None, trust_remote_code: bool
) -> None:
    """Raise what the preflight will raise for the specs of this checkpoint.

    Raises:
        RefusedError: some site cannot take its conversion and the plan says `on_refusal: error`.
    """
    try:
        found = find_attention(open_empty(str(model), trust_remote_code), inputs)
        enforce(choose(found, plan), plan)
    except RefusedError:
        raise
    except ReattendError:  # stand-ins for weights may show less than the weights will
        return
