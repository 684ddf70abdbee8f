"""LatentAttention: multi-head latent attention (MLA) over a cache of r + R numbers per token.

DeepSeek-V2, arXiv 2405.04434; the conversion that fills it is `reattend.passes.rewrite.mla`.
Layout letters: B batch, N query length, M key length, H query heads, G key/value groups, d and e
key and value head widths, r latent rank (`kv_lora_rank`), R rotary width (`qk_rope_head_dim`).

Two forms of one module. *Expanded*: keys and values of every group are rebuilt from the latent,
then ordinary attention; best for prefill. *Absorbed*: the up-projections move to the query and
the output, and attention runs on the latent rows themselves; best for decode.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from reattend.mixers.base import Context, Rows, RowShapes, State
from reattend.mixers.block import BlockMixer, OpaqueProjection, project
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import stream_norm
from reattend.mixers.latent_config import LatentConfig, has_own_query
from reattend.mixers.norm import normed_heads
from reattend.mixers.rotary import grown, rotate, rotation
from reattend.mixers.scores import attend, attend_rows, per_head, refuse_opaque


class LatentAttention(BlockMixer):
    """MLA with DeepSeek's parameter names.

    `kv_b_proj` rows are grouped per key/value group as [key d | value e]. Blocks whose keys are
    normalised per head (Qwen3) keep `k_proj`, `v_proj`, `k_norm` before `kv_a_proj_with_mqa`,
    and turn normalised queries by `q_rope` [G, R, d].
    """

    kind = "latent"
    config: LatentConfig

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.config = config
        self.form: Literal["auto", "expanded", "absorbed"] = "auto"
        core, r, rope = config.core, config.kv_lora_rank, config.qk_rope_head_dim
        d, e, groups = core.qk_head_dim, core.v_head_dim, core.kv_heads
        memory = config.memory_size or config.hidden_size
        self.normed = has_own_query(config)
        q_width = core.heads * (d if self.normed else d + rope)
        q_bias = config.q.bias
        if config.q.opaque is not None:
            self.q_proj: nn.Module = OpaqueProjection(config.q.opaque)
        elif config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, q_width, q_bias)
        else:
            self.q_proj = nn.Sequential()
            self.q_proj.add_module(
                "q_a_proj", nn.Linear(config.hidden_size, config.q_lora_rank, False)
            )
            self.q_proj.add_module("q_b_proj", nn.Linear(config.q_lora_rank, q_width, q_bias))
        self.q_norm = stream_norm(config.q, core.heads, d)
        self.k_norm = stream_norm(config.k, groups, d)
        if self.normed:
            self.k_proj = nn.Linear(memory, groups * d, config.k.bias)
            self.v_proj = nn.Linear(memory, groups * e, False)
            self.q_rope = nn.Parameter(torch.zeros(groups, rope, d))
            down_in = groups * (d + e)
        else:
            down_in = memory
        self.kv_a_proj_with_mqa = nn.Linear(down_in, r + rope, False)
        self.k_rope_bias = nn.Parameter(torch.zeros(rope)) if config.rope_key_bias else None
        self.kv_a_layernorm = (
            nn.RMSNorm(r, eps=1e-6) if config.latent_norm == "rms" else nn.Identity()
        )
        self.kv_b_proj = nn.Linear(r, groups * (d + e), False)
        self.v_bias = nn.Parameter(torch.zeros(groups, e)) if config.value_bias else None
        self.k_bias = nn.Parameter(torch.zeros(groups, d)) if config.key_bias else None
        self._outside(config)
        self._up: tuple[Any, Tensor] | None = None

    @property
    def row_shapes(self) -> RowShapes:
        """The latent (r) and the rotated key (R), one head each."""
        return (1, self.config.kv_lora_rank), (1, self.config.qk_rope_head_dim)

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Rows | None]:
        """Queries (unrotated, rotated) and the tokens before them; latent and rotated key."""
        turn = self._turn(ctx, state, x_BND)
        offset = state.seen() if state is not None and self.adds_bias else 0
        both = self._queries(x_BND, turn, ctx)
        nope, rope_q = (grown(q, self.config.q.growth, ctx, state, x_BND) for q in both)
        query = (nope, rope_q, offset)
        if source_BMD is None:
            return query, None
        latent, rope = self._rows(source_BMD, turn)
        return query, (latent[:, None], rope[:, None])

    def attend(
        self, query: Any, rows: Rows, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        q_nope_BHNd, q_rope_BHNR, offset = query
        latent, rope = rows
        if span is not None:
            self._plain_scores()
            refuse_opaque(self.config.core)
            if ctx.fresh and q_nope_BHNd.shape[2] > 1:
                return self._prefill(q_nope_BHNd, q_rope_BHNR, latent, rope, span)
            u, _ = torch.ops.reattend.latent_attention(
                self._absorb(q_nope_BHNd), q_rope_BHNR, latent.squeeze(1), rope.squeeze(1), *span,
                scale=self.config.core.scale, causal=self.config.core.causal,
                sliding_window=self.config.core.window, softcap=self.config.core.softcap,
            )  # fmt: skip
            return self._values(u)
        n, m = q_nope_BHNd.shape[2], latent.shape[2]
        bias = self.score_bias(n, m, offset)
        if self._absorbs(n, m):
            return self._absorbed(q_nope_BHNd, q_rope_BHNR, latent, rope, ctx.mask, bias)
        return self._expanded(q_nope_BHNd, q_rope_BHNR, latent, rope, ctx.mask, bias)

    def _turn(
        self, ctx: Context, state: State | None, x_BND: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """cos, sin [B or 1, N, R / 2] of the kept slots."""
        if self.config.qk_rope_head_dim == 0:
            return None
        full = rotation(self.config.rotary, ctx, state, x_BND)
        assert full is not None
        columns = self.config.rope_columns
        if columns == tuple(range(len(columns))):  # no index to send to the device
            return full[0][..., : len(columns)], full[1][..., : len(columns)]
        index = torch.tensor(columns, device=x_BND.device)
        return full[0].index_select(-1, index), full[1].index_select(-1, index)

    def _queries(
        self, x_BND: Tensor, turn: tuple[Tensor, Tensor] | None, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """Unrotated [B, H, N, d] and rotated [B, H, N, R] queries."""
        c = self.config
        heads, d, rope = c.core.heads, c.core.qk_head_dim, c.qk_rope_head_dim
        y = project(self.q_proj, x_BND, ctx)
        if not self.normed:
            q = y.unflatten(-1, (heads, d + rope)).transpose(1, 2)
            q = q if c.q.scale == 1.0 else q * c.q.scale
            nope, turned = q.split([d, rope], -1)
        else:
            nope = normed_heads(y, heads, self.q_norm).transpose(1, 2)
            nope = nope if c.q.scale == 1.0 else nope * c.q.scale
            grouped = nope.unflatten(1, (c.core.kv_heads, -1))
            turned = torch.einsum("bgjnd,grd->bgjnr", grouped, self.q_rope).flatten(1, 2)
        return nope, rotate(turned, turn, rope // 2)

    def _rows(
        self, source_BMD: Tensor, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """What is cached for each token: latent [B, M, r] and rotated key [B, M, R]."""
        c = self.config
        if self.normed:
            keys = normed_heads(self.k_proj(source_BMD), c.core.kv_heads, self.k_norm).flatten(2)
            source_BMD = torch.cat([keys, self.v_proj(source_BMD)], -1)
        latent, rope = self.kv_a_proj_with_mqa(source_BMD).split(
            [c.kv_lora_rank, c.qk_rope_head_dim], -1
        )
        if self.k_rope_bias is not None:
            rope = rope + self.k_rope_bias
        rope = rotate(rope[:, None], turn, c.qk_rope_head_dim // 2)[:, 0]
        return self.kv_a_layernorm(latent), rope

    def up(self) -> tuple[Tensor, Tensor]:
        """W_UK [G, d, r] and W_UV [G, e, r], read *through* `kv_b_proj`.

        A LoRA or quantised layer in its place is therefore honoured; its matrix is computed once
        per version of its parameters.
        """
        c = self.config.core
        if type(self.kv_b_proj) is nn.Linear:
            weight = self.kv_b_proj.weight
        else:
            weight = self._through(self.kv_b_proj)
        grouped = weight.unflatten(0, (c.kv_heads, c.qk_head_dim + c.v_head_dim))
        keys, values = grouped.split([c.qk_head_dim, c.v_head_dim], 1)
        return keys, values

    def _through(self, layer: nn.Module) -> Tensor:
        tensors = [*layer.parameters(), *layer.buffers()]
        switches = [
            (str(getattr(m, "active_adapters", "")), bool(getattr(m, "_disable_adapters", False)))
            for m in layer.modules()
        ]
        key = ([(id(t), t._version) for t in tensors], switches, layer.training)
        if not torch.is_grad_enabled() and self._up is not None and self._up[0] == key:
            return self._up[1]
        rank = self.config.kv_lora_rank
        like = next(t for t in tensors if t.is_floating_point())
        eye = torch.eye(rank, dtype=like.dtype, device=like.device)
        weight: Tensor = layer(eye).t()
        if not torch.is_grad_enabled():
            self._up = (key, weight)
        return weight

    def _absorb(self, q_nope_BHNd: Tensor) -> Tensor:
        """W_UK^T q [B, H, N, r]."""
        up_key, _ = self.up()
        grouped = q_nope_BHNd.unflatten(1, (self.config.core.kv_heads, -1))
        return torch.einsum("bgjnd,gdr->bgjnr", grouped, up_key).flatten(1, 2)

    def _values(self, u_BHNr: Tensor, mass_BHN1: Tensor | None = None) -> Tensor:
        """W_UV u [B, H, N, e]; `mass`: what sinks leave of the probabilities, one without."""
        _, up_value = self.up()
        grouped = u_BHNr.unflatten(1, (self.config.core.kv_heads, -1))
        y = torch.einsum("bgjnr,ger->bgjne", grouped, up_value)
        if self.v_bias is not None:
            bias = self.v_bias[None, :, None, None]
            if mass_BHN1 is not None:
                bias = bias * mass_BHN1.unflatten(1, (self.config.core.kv_heads, -1))
            y = y + bias
        return y.flatten(1, 2)

    def _sinks(self, q_nope_BHNd: Tensor) -> Tensor | None:
        """Sinks beside absorbed scores, which lack q . key bias: they are lower by that."""
        sinks = per_head(self.sinks)
        if sinks is None or self.k_bias is None:
            return sinks
        grouped = q_nope_BHNd.unflatten(1, (self.config.core.kv_heads, -1))
        lacking = torch.einsum("bgjnd,gd->bgjn", grouped, self.k_bias).flatten(1, 2)
        return sinks - self.config.core.scale * lacking[..., None]

    def _absorbs(self, n: int, m: int) -> bool:
        """Whether the absorbed form needs fewer multiply-adds for N queries over M rows."""
        if self.form != "auto":
            return self.form == "absorbed"
        if n == m:
            return False
        c = self.config
        h, g, d, e = c.core.heads, c.core.kv_heads, c.core.qk_head_dim, c.core.v_head_dim
        r, rope = c.kv_lora_rank, c.qk_rope_head_dim
        expanded = m * r * g * (d + e) + n * m * h * (d + rope + e)
        return n * h * r * (d + e) + n * m * h * (2 * r + rope) < expanded

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, mask: Any,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q_BHNw = torch.cat([self._absorb(q_nope), q_rope], -1)
        rows_B1Mw = torch.cat([latent, rope], -1)
        sinks, values = self._sinks(q_nope), latent
        weighs = sinks is not None and self.v_bias is not None
        if weighs:  # a last column of ones becomes the probability that sinks leave
            values = torch.cat([latent, torch.ones_like(latent[..., :1])], -1)
        if q_BHNw.shape[2] == 1:  # heads become query rows: one product instead of H
            single = self.config.core.model_copy(update={"heads": 1, "kv_heads": 1})
            turned = [None if t is None else t.transpose(-3, -2) for t in (bias, sinks)]
            u = attend_rows(q_BHNw.transpose(1, 2), rows_B1Mw, values, single, mask, *turned)
            u = u.transpose(1, 2)
        else:
            core = self._core(q_BHNw.shape[-1])
            u = attend(q_BHNw, rows_B1Mw, values, core, mask, bias, sinks)
        return self._values(u[..., :-1], u[..., -1:]) if weighs else self._values(u)

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, mask: Any,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        keys, values = self._rebuilt(latent, rope)
        q = torch.cat([q_nope, q_rope], -1)
        return attend(q, keys, values, self.config.core, mask, bias, per_head(self.sinks))

    def _prefill(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor, span: Any
    ) -> Tensor:
        """`_expanded` by the op, over the rows of the first call alone."""
        c, n = self.config.core, q_nope.shape[2]
        keys, values = self._rebuilt(latent[:, :, :n], rope[:, :, :n])
        y_BHNe: Tensor = torch.ops.reattend.attention(
            torch.cat([q_nope, q_rope], -1), keys, values, *span, scale=c.scale, causal=c.causal,
            sliding_window=c.window, softcap=c.softcap,
        )[0]  # fmt: skip
        return y_BHNe

    def _rebuilt(self, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, G, M, d + R] and values [B, G, M, e] of every group."""
        c = self.config.core
        both = self.kv_b_proj(latent[:, 0]).unflatten(
            -1, (c.kv_heads, c.qk_head_dim + c.v_head_dim)
        )
        keys, values = both.transpose(1, 2).split([c.qk_head_dim, c.v_head_dim], -1)
        if self.v_bias is not None:
            values = values + self.v_bias[None, :, None]
        if self.k_bias is not None:
            keys = keys + self.k_bias[None, :, None]
        return torch.cat([keys, rope.expand(-1, c.kv_heads, -1, -1)], -1), values

    def _core(self, width: int) -> CoreConfig:
        return self.config.core.model_copy(update={"kv_heads": 1, "qk_head_dim": width})
