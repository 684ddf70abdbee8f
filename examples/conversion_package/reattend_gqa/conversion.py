"""`to: mean-gqa`: neighbouring key/value heads become their mean.

Ainslie et al., GQA, arXiv 2305.13245, section 2.1: the starting point for training a model with
fewer key/value heads. The cache shrinks by the same factor. Without training the result is far
from the original, so a plan that uses it wants a `calibrate` section.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, dense_cost


class GqaOptions(Frozen):
    """The keys a plan may write beside `to: mean-gqa`.

    Attributes:
        kv_heads: key/value heads to keep; a divisor of the block's own number.
    """

    kv_heads: int = Field(ge=1)


class ToGqa(Conversion):
    """Fewer key/value heads; exact where the number stays."""

    name = "mean-gqa"
    Options = GqaOptions

    def check(self, config: DenseConfig, options: GqaOptions) -> Refusal | None:
        """The number must divide, and no norm may span the heads that are averaged."""
        groups = config.core.kv_heads
        if groups % options.kv_heads:
            return Refusal(f"kv_heads {options.kv_heads} does not divide {groups}")
        for name, stream in (("keys", config.k), ("values", config.v)):
            if stream.norm is not None and stream.norm.scope == "full":
                return Refusal(f"{name} are normalised over all heads at once")
        return None

    def build(self, dense: DenseAttention, statistics: Any, options: GqaOptions) -> Built:
        """A smaller `DenseAttention`. Its query heads are ordered by key/value head already."""
        kv_heads = options.kv_heads
        with torch.device("meta"):  # shapes only: the weights come next
            mixer = DenseAttention(_fewer(dense.config, kv_heads))
        state = {
            name: _mean(tensor, dense.config.core.kv_heads, kv_heads)
            if name.startswith(("k_proj.", "v_proj."))
            else tensor
            for name, tensor in dense.state_dict().items()
        }
        mixer.load_state_dict(state, strict=True, assign=True)
        for parameter in mixer.parameters():
            parameter.requires_grad_(True)
        same = kv_heads == dense.config.core.kv_heads
        return Built(mixer.eval(), "exact" if same else "learned", {"kv_heads": kv_heads})

    def exact_setting(self, config: DenseConfig) -> GqaOptions:
        """Every key/value head is kept."""
        return GqaOptions(kv_heads=config.core.kv_heads)

    def cost(self, config: DenseConfig, options: GqaOptions) -> Cost:
        """That of an ordinary block with fewer key/value heads."""
        return dense_cost(_fewer(config, options.kv_heads))


def _fewer(config: DenseConfig, kv_heads: int) -> DenseConfig:
    core = config.core.model_copy(update={"kv_heads": kv_heads})
    return config.model_copy(update={"core": core})


def _mean(rows: Tensor, before: int, after: int) -> Tensor:
    """Average neighbouring heads: [before * d, ...] to [after * d, ...], in at least float32."""
    if before == after:
        return rows
    heads: Tensor = rows.unflatten(0, (after, before // after, -1))
    wide = heads if heads.dtype == torch.float64 else heads.float()
    return wide.mean(1).flatten(0, 1).to(rows.dtype)
