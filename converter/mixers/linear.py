"""LinearAttention: softmax over a window of keys, and a state of fixed size for all older ones.

    y_n = [ m sum_(j in window) exp(s_nj - c_n) v_j + sum_(j older) (phi(q_n) . phi(k_j)) v_j ]
        / [ the same with values of 1 ]

c_n is the largest score in the window, m the weight of the window. LoLCATs, Zhang et al., arXiv
2410.10254; without a window it is linear attention, Katharopoulos et al., arXiv 2006.16236. Where
no key is older than the window m cancels, and this is softmax attention. The sums over older keys
are `reattend::linear_attention`. A bidirectional block sums all keys once, for every query.

Layout letters: B batch, N new tokens, L slots (`linear_rows`), H query heads, G KV heads, S heads
of the state, d and e key and value widths, f features, c columns of the state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend.errors import ArgumentError
from reattend.kernels.linear_attention import linear_attention
from reattend.kernels.linear_attention.reference import divided, with_ones
from reattend.mixers.base import Context, State
from reattend.mixers.block import project
from reattend.mixers.dense import DenseAttention, stream
from reattend.mixers.everywhere import Call, Everywhere
from reattend.mixers.features import FeatureMap, widened
from reattend.mixers.keeping import holding
from reattend.mixers.linear_config import LinearConfig
from reattend.mixers.linear_rows import (
    Lined,
    Memory,
    Rows,
    lined,
    mapped_rows,
    memory_of,
    remembered,
)
from reattend.mixers.linear_window import band, first_visible, shifted_exp
from reattend.mixers.places import places, usual, valid_tokens
from reattend.mixers.rotary import grown, rotate, rotation

#: Added to what `normalize: group` and `rms` divide by, squared.
EPS = 1e-5


class New(NamedTuple):
    """Rows of new tokens, as in `Memory`, and which are real [B, N]."""

    rows: Rows
    valid_BN: Tensor | None


class Stored(NamedTuple):
    """Rows of a call with a cache, and what it holds after it."""

    found: Lined
    after: Memory


class LinearAttention(DenseAttention):
    """The weights of a DenseAttention, two feature maps, and how much the window counts."""

    kind = "linear"
    config: LinearConfig  # type: ignore[assignment]

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        self.begin(config)

    def begin(self, config: LinearConfig) -> None:
        """What there is beside the block's own modules."""
        self.config = config
        core, name = config.core, config.feature_map
        width, rows = core.qk_head_dim, config.feature_dim
        self.features_q = FeatureMap(name, core.heads, width, rows)
        self.features_k = FeatureMap(name, config.state_heads, width, rows)
        self.mix_H: nn.Parameter | None = None
        self.everywhere = Everywhere(config) if config.direction == "bidirectional" else None
        if config.mix_learned and config.window:
            start = math.log(config.mix / (1 - config.mix))
            self.mix_H = nn.Parameter(torch.full((core.heads,), start))

    def fresh(self) -> Iterator[nn.Parameter]:
        """Weights of feature maps and windows."""
        for new in (self.features_q, self.features_k):
            yield from new.parameters()
        if self.mix_H is not None:
            yield self.mix_H

    @property
    def keeps(self) -> bool:
        """A window of rows."""
        return self.config.direction == "causal"

    @property
    def holds(self) -> bool:
        """And a state."""
        return self.keeps

    def project(
        self, x_BND: Tensor, source_BMD: Tensor | None, ctx: Context, state: State | None
    ) -> tuple[Any, Any]:
        """Queries and their features; rows and which tokens are real."""
        c = self.config
        turn = rotation(c.rotary, ctx, state, x_BND)
        pairs = c.rotary.pairs if c.rotary else 0
        x_q, x_k = (x_BND, x_BND) if self.everywhere is None else self.everywhere.inputs(x_BND)
        q_BNp, k_BNp = project(self.q_proj, x_q, ctx), project(self.k_proj, x_k, ctx)

        def queries(turned: Any) -> Tensor:
            made = stream(q_BNp, c.core.heads, c.q, self.q_norm, turned, pairs)
            return grown(made, c.q.growth, ctx, state, x_BND)

        def keys(turned: Any) -> Tensor:
            return stream(k_BNp, c.core.kv_heads, c.k, self.k_norm, turned, pairs)

        v_BNp = project(self.v_proj, x_BND, ctx)
        v = stream(v_BNp, c.core.kv_heads, c.v, self.v_norm, None, 0)
        q, k = queries(turn), keys(turn)
        valid = self.real(x_BND, ctx, state)
        if c.rope == "before":
            return (q, self.features_q(q)), New((k, v), valid)
        f, plain = self.features_q(queries(None)), keys(None)
        if c.rope == "after":
            f, plain = rotate(f, turn, pairs), rotate(self._mapped(plain), turn, pairs)
        return (q, f), New((k, v, plain), valid)

    def real(self, x_BND: Tensor, ctx: Context, state: State | None) -> Tensor | None:
        """Which new tokens are no padding, [B, N]; None: all."""
        return valid_tokens(ctx.mask, *x_BND.shape[:2])

    def store(self, new: Any, state: State) -> Any:
        """The window moves on; what leaves it goes into the state.

        Raises:
            UnsupportedCacheError: the cache has no place for a state.
        """
        held = holding(state)
        memory = memory_of(held)
        found = lined(new.rows, new.valid_BN, memory, self.config)
        after = remembered(
            found, new.valid_BN, memory, self.config, self._features_k, self._columns
        )
        held.hold((*after.rows, after.state_BSfc, after.count_B), found.place_BN.shape[1])
        return Stored(found, after)

    def attend(
        self, query: Any, rows: Any, ctx: Context, span: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """See `Mixer.attend`."""
        (q, f_q), c = query, self.config
        if self.everywhere is not None:
            return self._everywhere(self.everywhere, q, f_q, rows, ctx)
        fresh = isinstance(rows, New)
        found = lined(rows.rows, rows.valid_BN, None, c) if fresh else rows.found
        self._known(ctx.mask, found.place_BN)
        if not fresh and q.shape[2] == 1:
            y = self._step(q, f_q, rows)
        else:
            y = found.gathered(self._all(found.spread(q), found.spread(f_q), found))
        return self.finished(y, q.dtype)

    def finished(self, y_BHNc: Tensor, dtype: torch.dtype) -> Tensor:
        """Outputs [B, H, N, e] from sums."""
        y = y_BHNc
        if self.config.normalize == "sum":
            y = divided(y)
        elif self.config.normalize == "rms":
            y = y * (y.square().mean((1, 3), keepdim=True) + EPS).rsqrt()
        elif self.config.normalize == "group":
            y = F.layer_norm(y, (y.shape[-1],), eps=EPS)
        made: Tensor = y.to(dtype)
        return made

    def _everywhere(
        self, attention: Everywhere, q_BHNd: Tensor, f_BHNf: Tensor, new: New, ctx: Context
    ) -> Tensor:
        """Outputs [B, H, N, e] of a block in which every token sees all."""
        valid_BN, (b, _, n, _) = new.valid_BN, q_BHNd.shape
        self._known(ctx.mask, places(valid_BN, n, q_BHNd.device).expand(b, n))
        keys, values = new.rows[:2]
        mapped = self._features_k(mapped_rows(new.rows))
        columns = self._columns(values)
        call = Call(q_BHNd, keys, values, f_BHNf, mapped, columns, valid_BN)
        y: Tensor = attention(call, lambda sums: self.finished(sums, q_BHNd.dtype))
        return y

    def _all(self, q_BHLd: Tensor, f_BHLf: Tensor, found: Lined) -> Tensor:
        """Sums over all keys, [B, H, L, c], of the queries in every slot."""
        c, (b, _, length, _) = self.config, q_BHLd.shape
        wide = f_BHLf.dtype
        y: Tensor | None = None
        if c.window:
            y = self._near(q_BHLd, found) * self._mix(wide)
            if found.before is None and length <= c.held_rows:
                return y  # no key is older
        decay = None
        if c.decay:
            decay = f_BHLf.new_tensor(c.decay)[None, :, None].expand(b, -1, length)
        lag, block = 0, 1
        if c.window:
            lag, block = (c.window, 1) if c.window_form == "sliding" else (c.window + 1, c.window)
        k, v = self._features_k(mapped_rows(found.rows)), self._columns(found.rows[1])
        older: Tensor = linear_attention(f_BHLf, k, v, decay, found.before, lag, block)[0]
        return older if y is None else y + older

    def _step(self, q_BH1d: Tensor, f_BH1f: Tensor, rows: Stored) -> Tensor:
        """The same for one query behind a cache, [B, H, 1, c]."""
        c, found, after = self.config, rows.found, rows.after
        place_B = found.place_BN[:, 0]
        older = f_BH1f.unflatten(1, (c.state_heads, -1))[..., 0, :] @ after.state_BSfc
        if c.decay:
            apart_B = place_B + 1 - first_visible(after.count_B, c.window, c.window_form)
            older = older * (apart_B[:, None] * older.new_tensor(c.decay)).exp()[..., None, None]
        y: Tensor = older.flatten(1, 2)[:, :, None]
        if not c.window:
            return y
        both: Tensor = y + self._near_step(q_BH1d, found) * self._mix(y.dtype)
        return both

    def _near(self, q_BHLd: Tensor, found: Lined) -> Tensor:
        """The window's sums, and the sum of its weights in the last column, [B, H, L, e + 1]."""
        c, v = self.config, with_ones(widened(found.rows[1]))
        k, q = found.rows[0].to(v.dtype), q_BHLd.to(v.dtype)
        return band(q, k, v, c.core.scale, c.window, c.window_form)

    def _near_step(self, q_BH1d: Tensor, found: Lined) -> Tensor:
        """The same for one query behind a cache."""
        c, last, place_B = self.config, found.slot_BN, found.place_BN[:, 0]
        assert last is not None
        v = with_ones(widened(found.rows[1]))
        q, k = q_BH1d.to(v.dtype), found.rows[0].to(v.dtype)
        scores = q.unflatten(1, (c.core.kv_heads, -1))[..., 0, :] @ k.transpose(-1, -2)
        slot = torch.arange(k.shape[2], device=k.device)
        first = first_visible(place_B + 1, c.window, c.window_form) - (place_B - last[:, 0])
        seen = ((slot >= first[:, None]) & (slot <= last)) | (last < 0)
        scores = (scores * c.core.scale).masked_fill(~seen[:, None, None], float("-inf"))
        return (shifted_exp(scores) @ v).flatten(1, 2)[:, :, None]

    def _mix(self, dtype: torch.dtype) -> Tensor | float:
        """Weight of the window against that of older keys, [H, 1, 1] or a number."""
        if self.mix_H is None:
            return self.config.mix / (1 - self.config.mix if self.config.blended else 1)
        mix = self.mix_H.to(dtype)
        return (mix.exp() if self.config.blended else mix.sigmoid())[:, None, None]

    def _mapped(self, k_BGnd: Tensor) -> Tensor:
        """Features of keys, [B, S, n, f]."""
        repeat = self.config.state_heads // k_BGnd.shape[1]
        made: Tensor = self.features_k(
            k_BGnd.repeat_interleave(repeat, 1) if repeat > 1 else k_BGnd
        )
        return made

    def _features_k(self, row_BGnw: Tensor) -> Tensor:
        """Features of `mapped_rows`."""
        return row_BGnw if self.config.rope == "after" else self._mapped(row_BGnw)

    def _values(self, v_BGne: Tensor) -> Tensor:
        """Columns [B, G, n, c], in float32 or wider."""
        v = widened(v_BGne)
        return with_ones(v) if self.config.normalize == "sum" else v

    def _columns(self, v_BGne: Tensor) -> Tensor:
        """Columns for every head of the state, [B, S, n, c]."""
        repeat = self.config.state_heads // v_BGne.shape[1]
        v = self._values(v_BGne)
        return v.repeat_interleave(repeat, 1) if repeat > 1 else v

    def _known(self, mask: Tensor | None, place_BN: Tensor) -> None:
        """A state knows order and padding, nothing else a mask may say."""
        if mask is None or mask.dim() != 4 or torch.compiler.is_compiling():
            return
        if place_BN.shape[1] > 1 and not usual(mask, place_BN, self.config.core):
            raise ArgumentError(
                "a block with linear attention was given a mask that hides more than padding",
                why="older keys are summed in one state, and none of them can be left out of it",
                next_step="pass a 2-D attention_mask, and one text per row",
            )
