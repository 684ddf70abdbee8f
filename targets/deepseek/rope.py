"""The `rope_parameters` under which a DeepSeek class computes the rotary table that is needed.

Candidates are tried on transformers' own code and compared: the host's own parameters, read at the
new width R (which is right for evenly strided frequencies, and for scalings that act on each
frequency alone, as llama3's does), then `longrope`, whose factors, one per pair, express any table.
"""

from __future__ import annotations

from typing import Any

import torch

#: relative difference of frequencies that is no difference
LIMIT = 1e-6
MARKS = ("partial_rotary_factor", "mrope_section", "mscale", "mscale_all_dim")


def length_dependent(config: Any) -> str:
    """The host's rope type where its table changes with the length of the text, else nothing."""
    given = rope_of(config)
    kind = str(given.get("rope_type", "default"))
    if kind == "dynamic":
        return kind
    if kind == "longrope" and given.get("short_factor") != given.get("long_factor"):
        return "longrope (two tables, for short and for long texts)"
    return ""


def rope_of(config: Any) -> dict[str, Any]:
    """The host's parameters; empty where it has none, or one set per kind of layer."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return dict(given) if isinstance(given.get("rope_type"), str) else {}


def plain_base(config: Any) -> float | None:
    """Base of the host's table where it is the plain one."""
    given = rope_of(config)
    return float(given["rope_theta"]) if given.get("rope_type") == "default" else None


def rope_parameters(
    build: Any, host: Any, frequencies: tuple[float, ...]
) -> tuple[dict[str, Any], bool]:
    """Parameters whose table is `frequencies`, and whether it is the plain table.

    Args:
        build: rope_parameters -> inv_freq and scaling, by the class that will load the result.
        host: config of the host.
        frequencies: radians per token of the R / 2 slots, highest first.
    """
    needed = torch.tensor(frequencies, dtype=torch.float64)
    given = rope_of(host)
    own = {k: v for k, v in given.items() if k not in MARKS}
    if own.get("rope_type") in ("default", "linear", "llama3", "yarn"):
        table, scaling = build(own)
        if scaling == 1.0 and _equal(table, needed):
            return own, own["rope_type"] == "default"
    factors = [float(f) for f in (1.0 / needed).float()]
    length = int(host.get_text_config().max_position_embeddings)
    free = {
        "rope_type": "longrope", "rope_theta": 1.0, "factor": 1.0, "attention_factor": 1.0,
        "short_factor": factors, "long_factor": factors,
        "original_max_position_embeddings": length,
    }  # fmt: skip
    table, scaling = build(free)
    assert scaling == 1.0 and _equal(table, needed), "longrope does not give the table asked for"
    return free, False


def _equal(table: torch.Tensor, needed: torch.Tensor) -> bool:
    if table.shape != needed.shape:
        return False
    return bool(((table.double() / needed - 1).abs() <= LIMIT).all())
