"""Moments of the queries, and of keys and values weighted by the attention they receive.

What a lost key direction costs depends on the queries that read it, on how far away they are,
and on how much attention the token gets. All three are sums over the calibration tokens, so
memory does not grow with the data. Layout letters: B rows, N tokens, H query heads, G groups,
P rotary pairs, d key width, Y = G (d + e).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.mixers.dense import DenseAttention, stream
from reattend.mixers.rotary import rotate
from reattend.mixers.scores import visibility

#: Share of a query's weight that goes by its own attention; the rest is even over what it sees.
ATTENDED = 0.9


@dataclass
class AttentionMoments:
    """Sums over tokens, float64.

    A query spreads the weight 1 over the keys it sees (`ATTENDED` of it by attention); `gram` and
    `total` weigh every token by the mean over heads of what it receives.

    Attributes:
        gram: weighted sum of y y^T, y = [keys | values] without bias, [Y, Y].
        total: weighted sum of y, [Y].
        queries: sum of q q^T, unrotated, bias and scale included, [H, d, d].
        phases: weighted sum of cos and sin of (query - key position) x inv_freq, [H, P, 2].
        query_norms, key_norms: sums of the length of each rotary pair, [H, P] and [G, P].
    """

    gram: Tensor
    total: Tensor
    queries: Tensor
    phases: Tensor
    query_norms: Tensor
    key_norms: Tensor

    @classmethod
    def empty(cls, dense: DenseAttention) -> AttentionMoments:
        """Zero sums of the right sizes."""
        core, rotary = dense.config.core, dense.config.rotary
        heads, groups, d = core.heads, core.kv_heads, core.qk_head_dim
        width, pairs = groups * (d + core.v_head_dim), rotary.pairs if rotary else 0
        shapes = [
            (width, width), (width,), (heads, d, d), (heads, pairs, 2), (heads, pairs),
            (groups, pairs),
        ]  # fmt: skip
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(
        self, dense: DenseAttention, x_BND: Tensor, y_BNY: Tensor, valid: Tensor | None
    ) -> None:
        """Add rows; `y_BNY` are their keys and values, `valid` [B, N] marks real tokens."""
        for row in range(x_BND.shape[0]):
            x, y = x_BND[row], y_BNY[row]
            if valid is not None:
                real = valid[row].bool()
                x, y = x[real], y[real]
            if len(x):
                self._add_row(dense, x[None], y.double().cpu())

    def _add_row(self, dense: DenseAttention, x_1ND: Tensor, y_NY: Tensor) -> None:
        c = dense.config
        heads, groups, n = c.core.heads, c.core.kv_heads, x_1ND.shape[1]
        pairs = c.rotary.pairs if c.rotary else 0
        q = stream(dense.q_proj(x_1ND), heads, c.q, dense.q_norm, None, 0)[0].cpu()
        k = stream(dense.k_proj(x_1ND), groups, c.k, dense.k_norm, None, 0)[0].cpu()
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        weight_HNN = spread(dense, q.to(wide), k.to(wide))
        q, k, received = q.double(), k.double(), weight_HNN.sum(1).double().mean(0)
        self.gram += y_NY.t() @ (y_NY * received[:, None])
        self.total += received @ y_NY
        self.queries += torch.einsum("hni,hnj->hij", q, q)
        if pairs and c.rotary is not None:
            angle = _distances(n)[:, None] * torch.tensor(c.rotary.inv_freq, dtype=torch.float64)
            by_distance = diagonal_sums(weight_HNN).double()
            self.phases += torch.stack([by_distance @ angle.cos(), by_distance @ angle.sin()], -1)
            for sums, z in ((self.query_norms, q), (self.key_norms, k)):
                sums += torch.hypot(z[..., :pairs], z[..., pairs : 2 * pairs]).sum(1)

    def part(self, y: Tensor, heads: list[int], groups: list[int]) -> AttentionMoments:
        """The sums of some heads; tokens keep the weight that all heads of the block gave them.

        Args:
            y: their rows of `gram`.
            heads: query heads.
            groups: key/value groups.
        """
        return AttentionMoments(
            self.gram[y][:, y], self.total[y], self.queries[heads], self.phases[heads],
            self.query_norms[heads], self.key_norms[groups],
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """For storage beside the run."""
        return {f"attention.{f.name}": getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> AttentionMoments | None:
        """The inverse of `tensors`; None where they were not collected."""
        if "attention.gram" not in stored:
            return None
        return cls(*(stored[f"attention.{f.name}"] for f in fields(cls)))


def spread(dense: DenseAttention, q_HNd: Tensor, k_GNd: Tensor) -> Tensor:
    """Each query's weight over the keys [H, N, N]: rows sum to 1, hidden keys get 0."""
    c, n = dense.config, q_HNd.shape[1]
    if c.rotary is not None:
        wide = torch.float64
        angle = torch.arange(n)[:, None] * torch.tensor(c.rotary.inv_freq, dtype=wide)
        turn = ((angle.cos() * c.rotary.scaling)[None], (angle.sin() * c.rotary.scaling)[None])
        q_HNd = rotate(q_HNd[None], turn, c.rotary.pairs)[0]
        k_GNd = rotate(k_GNd[None], turn, c.rotary.pairs)[0]
    keys = k_GNd.repeat_interleave(c.core.heads // c.core.kv_heads, 0)
    scores = q_HNd @ keys.transpose(1, 2) * c.core.scale
    if c.core.softcap:
        scores = c.core.softcap * torch.tanh(scores / c.core.softcap)
    seen = visibility(None, c.core, n, n, scores[None])
    added = dense.score_bias(n, n, 0)
    if added is not None:
        scores = scores + added[0].to(scores)
    if seen is None:
        seen = torch.ones(1, 1, n, n, dtype=torch.bool)
    scores = scores.masked_fill(~seen[0], float("-inf"))
    even = seen[0].to(scores.dtype) / seen[0].sum(-1, keepdim=True)
    return ATTENDED * scores.softmax(-1) + (1 - ATTENDED) * even


def diagonal_sums(weight_HNN: Tensor) -> Tensor:
    """Sums over the diagonals [H, 2 N - 1], in the order of `_distances`."""
    heads, n, _ = weight_HNN.shape
    flat = F.pad(weight_HNN.flip(2), (0, n)).flatten(1)[:, : n * (2 * n - 1)]
    return flat.reshape(heads, n, 2 * n - 1).sum(1)


def _distances(n: int) -> Tensor:
    """Query minus key position of each diagonal of `diagonal_sums`."""
    return torch.arange(2 * n - 1, dtype=torch.float64) - (n - 1)
