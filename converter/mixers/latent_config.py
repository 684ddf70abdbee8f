"""What describes a latent block: the part of `config.json` that `LatentAttention` is built from."""

from __future__ import annotations

from typing import Literal

from reattend.mixers.config import BlockConfig


class LatentConfig(BlockConfig):
    """A block in latent form.

    Attributes:
        kv_lora_rank: r, rows of the latent.
        qk_rope_head_dim: R, rotary dimensions shared by all heads.
        rope_columns: for each of the R / 2 rotary slots, the frequency (column of the model's
            rotary table) it turns with.
        q_lora_rank: rank of the query projection, None for a full one.
        latent_norm: normalisation of the latent before it is cached.
        value_bias: values carry a bias that could not be folded into the output projection.
        rope_key_bias: rotated keys carry a bias.
        key_bias: unrotated keys carry one; only beside sinks, where softmax does not cancel it.
    """

    kind: Literal["latent"] = "latent"
    kv_lora_rank: int
    qk_rope_head_dim: int
    rope_columns: tuple[int, ...]
    q_lora_rank: int | None = None
    latent_norm: Literal["none", "rms"] = "none"
    value_bias: bool = False
    rope_key_bias: bool = False
    key_bias: bool = False


def has_own_query(config: BlockConfig) -> bool:
    """Whether queries are not one linear map, so that nothing can be absorbed into it."""
    normed = config.q.norm is not None or config.k.norm is not None
    return normed or config.q.opaque is not None
