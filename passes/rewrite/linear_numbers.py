"""What a linear block has and holds, for forecasts and reports."""

from __future__ import annotations

from typing import Any

from reattend.mixers.linear_config import BIASED, LEARNED, LinearConfig
from reattend.mixers.recurrent_config import RecurrentConfig
from reattend.mixers.sparse_linear_config import SparseLinearConfig
from reattend.passes.rewrite.linear_everywhere import everywhere_stated, everywhere_weights


def own_weights(made: LinearConfig) -> int:
    """Parameters beside the block's own."""
    rows = made.feature_dim * made.core.qk_head_dim if made.feature_map in LEARNED else 0
    bias = made.feature_dim if made.feature_map in BIASED else 0
    maps = 2 if made.feature_map == "hedgehog-fla" else made.core.heads + made.state_heads
    mix = made.core.heads if made.mix_learned and made.window else 0
    return maps * (rows + bias) + mix + everywhere_weights(made)


def stated(made: LinearConfig) -> dict[str, Any]:
    """For the report: what is held, and what it is worth in tokens of the original's cache."""
    told: dict[str, Any] = {
        "feature_map": made.feature_map,
        "features": made.features,
        "window": f"{made.window} {made.window_form}" if made.window else "none",
        "state_numbers": made.state_numbers,
    }
    if isinstance(made, SparseLinearConfig):
        state = made.state_numbers / made.cache_per_token
        told["held_in_tokens"] = f"all, their blocks' means, and {state:.1f}"
    elif made.direction == "causal":
        told["held_in_tokens"] = f"{made.held_after(made.held_rows) / made.cache_per_token:.1f}"
    if isinstance(made, RecurrentConfig):
        told["decay"] = (
            f"gated by keys, / {made.gate_divisor:g}" if made.decay_by == "keys" else "none"
        )
    if made.decay:
        told["decay"] = f"{min(made.decay):.4g} to {max(made.decay):.4g} per token"
    return told | everywhere_stated(made)
