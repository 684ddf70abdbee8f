"""What stands between a latent block and the attention of a DeepSeek class.

Every check reads the block's description alone, so that the same answers are given before a
conversion (for the block it will become) and before an export.
"""

from __future__ import annotations

from dataclasses import dataclass

from reattend.mixers.config import BlockConfig
from reattend.mixers.latent_config import LatentConfig

#: rule lines that make one rotary table and one size of all layers
UNIFORM = "kv_lora_rank: <number>, rope_select: per-frequency, rope_table: strided"
KEEP_FORMAT = "leave `deepseek` out: the reattend checkpoint and ONNX carry it"


@dataclass(frozen=True)
class Obstacle:
    """One reason, where it was met, and what to do about it."""

    where: str
    why: str
    next_step: str


def block_obstacles(path: str, config: BlockConfig) -> list[Obstacle]:
    """Everything in one block that no DeepSeek class computes; empty where it fits.

    Args:
        path: of the block.
        config: of the latent block, or of the original where the latent one is not known yet.
    """
    core = config.core
    latent = config if isinstance(config, LatentConfig) else None
    found: list[tuple[bool, str, str]] = [
        (config.cross, "cross-attention", KEEP_FORMAT),
        (
            core.pattern not in ("causal", "opaque") or core.unmasked == "full",
            f"its attention pattern is {core.pattern}"
            + (f" (window {core.window})" if core.window else "")
            + "; DeepSeek layers attend to all earlier tokens",
            KEEP_FORMAT,
        ),
        (
            core.pattern == "opaque",
            "its mask is the model's own and of no fixed pattern",
            KEEP_FORMAT,
        ),
        (core.softcap > 0, f"its scores are capped at {core.softcap:g}", KEEP_FORMAT),
        (core.sinks, "it has a logit sink per head", KEEP_FORMAT),
        (
            config.alibi is not None or config.relative is not None or config.added is not None,
            "it adds a position bias to its scores",
            KEEP_FORMAT,
        ),
        (
            config.gate is not None or config.join is not None,
            "something stands between its heads and the output projection",
            KEEP_FORMAT,
        ),
        (config.out_features is None, "it has no output projection of its own", KEEP_FORMAT),
        (
            config.q.norm is not None or config.k.norm is not None,
            "it normalises queries or keys per head: kv_a_proj_with_mqa has to be one matrix from "
            "the hidden state, and the norm stands in between",
            KEEP_FORMAT,
        ),
        (config.q.growth is not None, "its queries grow with position", KEEP_FORMAT),
        (config.q.opaque is not None, "its queries are made by the model's own steps", KEEP_FORMAT),
        (
            latent is not None and (latent.value_bias or latent.key_bias),
            "keys or values keep a bias that could not be moved into the output projection",
            KEEP_FORMAT,
        ),
        (
            latent is not None and latent.rotary is not None and not latent.qk_rope_head_dim,
            "nothing of it is rotated, and a DeepSeek layer has at least one rotated pair",
            "qk_rope_head_dim: 2 or more",
        ),
    ]
    return [Obstacle(path, why, step) for hit, why, step in found if hit]
