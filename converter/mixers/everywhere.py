"""Linear attention of blocks in which every token sees all: one sum over all keys, and variants.

Layout letters: B batch, N tokens, H query heads, G KV heads, S heads of the state, d and e key and
value widths, f features, c columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from reattend.kernels.linear_attention import linear_attention
from reattend.mixers.estimate import Estimate
from reattend.mixers.estimated import Estimated
from reattend.mixers.flow import flow
from reattend.mixers.input_map import InputMap
from reattend.mixers.linear_config import LinearConfig
from reattend.mixers.top_blocks import attend_best


class Call(NamedTuple):
    """What one call attends with.

    Attributes:
        q_BHNd, k_BGNd, v_BGNe: queries, keys and values as softmax would read them.
        f_BHNf, k_BSNf: features of queries and keys, in float32 or wider.
        columns_BSNc: values, and a column of ones where sums are divided by weights.
        valid_BN: which tokens are real; None: all.
    """

    q_BHNd: Tensor
    k_BGNd: Tensor
    v_BGNe: Tensor
    f_BHNf: Tensor
    k_BSNf: Tensor
    columns_BSNc: Tensor
    valid_BN: Tensor | None


class Everywhere(nn.Module):
    """What a bidirectional block has of its own, and how it attends."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.config = config
        core, hidden, inner = config.core, config.hidden_size, config.mlp_width
        self.map_q = InputMap(hidden, inner) if inner else None
        self.map_k = InputMap(hidden, inner) if inner else None
        self.estimated: Estimated | None = None
        self.estimate: Estimate | None = None
        width, rows = core.qk_head_dim, config.feature_dim
        if config.estimate:
            heads = (core.heads, core.kv_heads)
            self.estimate = Estimate(config, heads, width, core.v_head_dim, rows)
        elif config.feature_map == "performer":
            self.estimated = Estimated(config, core.kv_heads, width, rows)
        self.rest: nn.Linear | None = None
        if config.projects:
            self.rest = nn.Linear(core.v_head_dim, core.v_head_dim)

    def start(self) -> None:
        """Weights before training, always the same: maps and the rest add nothing yet."""
        for seed, part in enumerate((self.map_q, self.map_k)):
            if part is not None:
                part.start(seed)
        for estimate in (self.estimated, self.estimate):
            if estimate is not None:
                estimate.start()
        if self.rest is not None:
            self.rest.weight.data.zero_()
            self.rest.bias.data.zero_()

    def inputs(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        """What queries and what keys are projected from."""
        if self.map_q is None or self.map_k is None:
            return x_BND, x_BND
        return self.map_q(x_BND), self.map_k(x_BND)

    def forward(self, call: Call, finished: Callable[[Tensor], Tensor]) -> Tensor:
        """Outputs [B, H, N, e].

        Args:
            call: see there.
            finished: outputs from sums, as `normalize` says.
        """
        c, scale = self.config, self.config.core.scale
        softmax = (call.q_BHNd, call.k_BGNd, call.v_BGNe)
        for estimate in (self.estimated, self.estimate):
            if estimate is not None:
                y: Tensor = estimate(*softmax, scale, call.valid_BN)
                return y.to(call.q_BHNd.dtype)
        if c.flow:
            values = call.columns_BSNc[..., :-1]
            return flow(call.f_BHNf, call.k_BSNf, values, call.valid_BN).to(call.q_BHNd.dtype)
        k = call.k_BSNf
        if call.valid_BN is not None:
            k = k * call.valid_BN[:, None, :, None]
        sums = linear_attention(call.f_BHNf, k, call.columns_BSNc, bidirectional=True)[0]
        y = finished(sums)
        if self.rest is None:
            return y
        near = attend_best(*softmax, c, scale, call.valid_BN)
        both: Tensor = near + self.rest(y.to(near.dtype))
        return both
