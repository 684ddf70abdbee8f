"""SelectiveAttention: the block's projections in a Mamba-2 layer, as Mamba-in-Llama starts one.

    x, B, C = silu(conv(v)), silu(conv(k)), silu(conv(q))       each channel over the last 4 tokens
    S_n = exp(-dt_n A) S_(n-1) + dt_n B_n x_n^T                 dt = softplus(W_dt u + b), per head
    y_n = norm((C_n^T S_n + D x_n) silu(W_z u_n))               norm per head, with a weight

u is the block's input. Wang et al., arXiv 2408.15237; Mamba-2, Dao and Gu, arXiv 2405.21060.
Queries and keys are not rotated: order is in the state and the convolution. W_dt, b, A, D, W_z, the
convolution and the norm are new. Convolutions start as the token itself (theirs are drawn); A, b
and the two matrices are drawn from a generator of their own, within the published ranges.

Layout letters: B batch, N new tokens, L slots, H query heads, G KV heads, d and e key and value
widths, w taps of the convolution.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend.kernels.linear_attention import linear_attention
from reattend.mixers.base import Context, State
from reattend.mixers.block import project
from reattend.mixers.dense import stream
from reattend.mixers.features import widened
from reattend.mixers.keeping import holding
from reattend.mixers.linear import EPS
from reattend.mixers.linear_rows import Lined, Memory, Rows, kept_rows, lined, memory_of
from reattend.mixers.recurrent import Entering, RecurrentAttention, entered
from reattend.mixers.selective_config import SelectiveConfig

#: Published ranges of A and of dt at the start.
A_RANGE, DT_RANGE = (1.0, 16.0), (1e-3, 1e-1)


class ShortConv(nn.Module):
    """A causal convolution of every channel of every head by itself, and silu."""

    def __init__(self, heads: int, width: int, taps: int) -> None:
        super().__init__()
        self.weight_hdw = nn.Parameter(torch.zeros(heads, width, taps))
        self.bias_hd = nn.Parameter(torch.zeros(heads, width))

    def start(self) -> None:
        """The token itself."""
        with torch.no_grad():
            self.weight_hdw[..., -1] = 1.0

    def forward(self, x_BhLd: Tensor) -> Tensor:
        """The same shape, in float32 or wider; nothing stands before the first."""
        x = widened(x_BhLd)
        weight, taps = self.weight_hdw.to(x.dtype), self.weight_hdw.shape[-1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        y: Tensor = self.bias_hd.to(x.dtype)[:, None]
        for tap in range(taps):
            y = y + padded[:, :, tap : tap + x.shape[2]] * weight[:, None, :, tap]
        return F.silu(y)


class New(NamedTuple):
    """New tokens: `rows`, keys, values and queries before the convolution, which are real, and the
    step sizes [B, H, N].
    """

    rows: Rows
    valid_BN: Tensor | None
    dt_BHN: Tensor


class Mixed(NamedTuple):
    """New tokens behind the convolution: queries, and what enters the state."""

    q_BHNd: Tensor
    entering: Entering
    found: Lined


class SelectiveAttention(RecurrentAttention):
    """The block's four projections, and what a Mamba-2 layer has besides."""

    kind = "selective"
    config: SelectiveConfig

    def begin(self, config: SelectiveConfig) -> None:  # type: ignore[override]
        """What there is beside the block's own modules, at its start."""
        super().begin(config)
        core, hidden = config.core, config.hidden_size
        d, e = core.qk_head_dim, core.v_head_dim
        self.conv_q = ShortConv(core.heads, d, config.conv)
        self.conv_k = ShortConv(core.kv_heads, d, config.conv)
        self.conv_v = ShortConv(core.kv_heads, e, config.conv)
        self.z_proj = nn.Linear(hidden, core.heads * e, bias=False)
        self.dt_proj = nn.Linear(hidden, core.heads)
        self.a_log_H = nn.Parameter(torch.zeros(core.heads))
        self.skip_H = nn.Parameter(torch.ones(core.heads))
        self.norm_He = nn.Parameter(torch.ones(core.heads, e))

    def start(self) -> None:
        """The published start, from a generator of its own."""
        drawn = torch.Generator().manual_seed(0)

        def uniform(like: Tensor, low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(like.shape, generator=drawn)

        with torch.no_grad():
            for conv in (self.conv_q, self.conv_k, self.conv_v):
                conv.start()
            bound = self.config.hidden_size**-0.5
            for matrix in (self.z_proj, self.dt_proj):
                matrix.weight.copy_(uniform(matrix.weight, -bound, bound))
            self.a_log_H.copy_(uniform(self.a_log_H, *A_RANGE).log())
            dt = uniform(self.a_log_H, *(math.log(x) for x in DT_RANGE)).exp()
            self.dt_proj.bias.copy_(dt + (-torch.expm1(-dt)).log())  # softplus of it is dt

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """The gate; rows before the convolution, and steps."""
        c = self.config
        every = (
            (self.k_proj, c.core.kv_heads, c.k, self.k_norm),
            (self.v_proj, c.core.kv_heads, c.v, self.v_norm),
            (self.q_proj, c.core.heads, c.q, self.q_norm),
        )
        rows = tuple(
            stream(project(module, x_BND, ctx), heads, config, norm, None, 0)
            for module, heads, config, norm in every
        )
        dt = F.softplus(widened(self.dt_proj(x_BND))).transpose(1, 2)
        return self.z_proj(x_BND), New(rows, self.real(x_BND, ctx, state), dt)

    def mixed(self, new: New, memory: Memory | None) -> Mixed:
        """Behind the convolution, which also sees the rows that are held."""
        found = lined(new.rows, new.valid_BN, memory, self.config.tail)
        k, v, q = found.rows
        return self.behind(new, found, self.conv_k(k), self.conv_v(v), self.conv_q(q))

    def behind(self, new: New, found: Lined, k: Tensor, v: Tensor, q: Tensor) -> Mixed:
        """What enters the state, of convolutions [B, h, L, .] in slots."""
        c, dt, valid = self.config, new.dt_BHN, new.valid_BN
        if valid is not None:
            dt = dt * valid[:, None]
        each = c.core.heads // c.core.kv_heads
        k, v = (found.gathered(x).repeat_interleave(each, 1) for x in (k, v))
        log = -dt * self.a_log_H.to(dt.dtype).exp()[:, None]
        entering = Entering(new.rows, valid, k * dt[..., None], v, log)
        return Mixed(found.gathered(q), entering, found)

    def store(self, new: Any, state: State) -> Any:
        """Everything new goes into the state; the last rows stay for the convolution."""
        held = holding(state)
        memory = memory_of(held)
        made = self.mixed(new, memory)
        rows, count_B, _ = kept_rows(made.found, new.valid_BN, memory, self.config.tail)
        after = entered(made.found.before, made.entering)
        held.hold((*rows, after, count_B), made.found.place_BN.shape[1])
        return made

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        made = self.mixed(rows, None) if isinstance(rows, New) else rows
        self._known(ctx.mask, made.found.place_BN)
        new = made.entering
        y = linear_attention(made.q_BHNd, new.k_BSNf, new.v_BSNc, new.log, made.found.before)[0]
        return self.gated(y, new.v_BSNc, query)

    def gated(self, y_BHNe: Tensor, x_BHNe: Tensor, z_BNp: Tensor) -> Tensor:
        """The skip, the gate and the norm, in the dtype of the gate."""
        dtype = y_BHNe.dtype
        y = y_BHNe + self.skip_H.to(dtype)[:, None, None] * x_BHNe
        z = z_BNp.unflatten(-1, self.norm_He.shape).transpose(1, 2).to(dtype)
        y = y * F.silu(z)
        y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return (y * self.norm_He.to(dtype)[:, None]).to(z_BNp.dtype)
