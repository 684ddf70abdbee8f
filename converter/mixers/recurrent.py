"""RecurrentAttention: a state that every key enters at once, and a window with its own output.

    S_n = diag(exp(g_n)) S_(n-1) + phi(k_n) v_n^T
    y_n = m softmax over the window + (1 - m) phi(q_n)^T S_n

g_n is the logarithm of what token n leaves of each row of the state: log sigmoid(k_n) / 16 where
keys gate it, as in Liger, Lan et al., arXiv 2503.01496, a gated linear attention (Yang et al.,
arXiv 2312.06635) without weights of its own. LoLCATs' window and state divide by one sum
(`linear.py`); here each has an output of its own, and no key of the state depends on the window.

Layout letters: B batch, N new tokens, H query heads, G KV heads, S heads of the state, f features,
c columns of the state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.kernels.linear_attention import linear_attention
from reattend.kernels.linear_attention.reference import divided
from reattend.mixers.base import Context, State
from reattend.mixers.features import widened
from reattend.mixers.keeping import holding
from reattend.mixers.linear import LinearAttention
from reattend.mixers.linear_rows import (
    Lined,
    Memory,
    Rows,
    kept_rows,
    lined,
    mapped_rows,
    memory_of,
)
from reattend.mixers.recurrent_config import RecurrentConfig


class Entering(NamedTuple):
    """What new tokens bring.

    `rows`: keys and values, as in `Memory`; `valid_BN`: which are real; `k_BSNf`, `v_BSNc`,
    `log`: what enters the state, and the logarithm of what they leave of it, [B, S, N] or [B, S,
    N, f]; None: all. Padding brings and takes nothing.
    """

    rows: Rows
    valid_BN: Tensor | None
    k_BSNf: Tensor
    v_BSNc: Tensor
    log: Tensor | None


class Entered(NamedTuple):
    """A call with a cache: what came, rows in their slots, and what the cache holds after it."""

    new: Entering
    found: Lined
    after: Memory


class RecurrentAttention(LinearAttention):
    """The weights of a LinearAttention; nothing waits for leaving the window."""

    kind = "recurrent"
    config: RecurrentConfig

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """Queries and their features; what enters the state."""
        query, new = super().project(x_BND, source_BMD, ctx, state)
        mapped = mapped_rows(new.rows)
        k, v, log = self._features_k(mapped), self._columns(new.rows[1]), self.left(mapped)
        if (valid := new.valid_BN) is not None:
            k = k * valid[:, None, :, None]
            log = None if log is None else log * spread(valid, log)
        return query, Entering(new.rows[:2], valid, k, v, log)

    def left(self, row_BGNw: Tensor) -> Tensor | None:
        """Logarithms of what each token leaves of the state; None: all of it."""
        c, (b, groups, n, _) = self.config, row_BGNw.shape
        x = widened(row_BGNw)
        if c.decay_by == "keys":
            log: Tensor = F.logsigmoid(x) / c.gate_divisor
            return log.repeat_interleave(c.state_heads // groups, 1)
        if not c.decay:
            return None
        return x.new_tensor(c.decay)[None, :, None].expand(b, -1, n)

    def store(self, new: Any, state: State) -> Any:
        """Everything new goes into the state, and the window moves on."""
        held = holding(state)
        memory = memory_of(held)
        found = lined(new.rows, new.valid_BN, memory, self.config)
        rows, count_B, _ = kept_rows(found, new.valid_BN, memory, self.config)
        after = Memory(rows, entered(found.before, new), count_B)
        held.hold((*after.rows, after.state_BSfc, after.count_B), found.place_BN.shape[1])
        return Entered(new, found, after)

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        (q, f_q), c = query, self.config
        fresh = isinstance(rows, Entering)
        new = rows if fresh else rows.new
        found = lined(new.rows, new.valid_BN, None, c) if fresh else rows.found
        self._known(ctx.mask, found.place_BN)
        step = not fresh and q.shape[2] == 1
        if step:
            asked = f_q.unflatten(1, (c.state_heads, -1))[..., 0, :]
            older = (asked @ rows.after.state_BSfc).flatten(1, 2)[:, :, None]
        else:
            older = linear_attention(f_q, new.k_BSNf, new.v_BSNc, new.log, found.before)[0]
        y = self.finished(older, older.dtype)
        if c.window:
            near = self._near_step(q, found) if step else self._near(found.spread(q), found)
            y = self.averaged(near if step else found.gathered(near), y)
        return y.to(q.dtype)

    def averaged(self, near_BHNc: Tensor, y_BHNe: Tensor) -> Tensor:
        """Both outputs, each divided by its own sum."""
        mix = self._mix(y_BHNe.dtype)
        made: Tensor = mix * divided(near_BHNc) + (1 - mix) * y_BHNe
        return made


def spread(valid_BN: Tensor, log: Tensor) -> Tensor:
    """[B, N] in the dimensions of decays."""
    return valid_BN[:, None] if log.dim() == 3 else valid_BN[:, None, :, None]


def entered(state_BSfc: Tensor | None, new: Entering) -> Tensor:
    """The state after all new tokens; no exponent is positive."""
    k, state = new.k_BSNf, state_BSfc
    if state is None:
        state = k.new_zeros(*k.shape[:2], k.shape[3], new.v_BSNc.shape[3])
    if new.log is not None:
        sums = (new.log if new.log.dim() == 4 else new.log[..., None]).cumsum(-2)
        whole = sums[..., -1:, :]
        k, state = k * (whole - sums).exp(), state * whole.exp().transpose(-1, -2)
    return state + k.transpose(-1, -2) @ new.v_BSNc
