"""Moments of queries, keys and values in which a pair of tokens counts as much as its score does.

What a lost key direction costs depends on the queries that read it, on how far away they are, and
on what an error of that score does behind the softmax. All are sums over the calibration tokens,
so memory does not grow with the data. Layout letters: B rows, N tokens, H query heads, G groups,
P rotary pairs, d key width, e value width, Y = G (d + e).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.mixers.dense import DenseAttention, stream
from reattend.mixers.rotary import rotate
from reattend.mixers.scores import visibility

#: Share of a head's weight that goes by sensitivity; the rest is even over what its queries see.
SENSITIVE = 0.9


@dataclass
class AttentionMoments:
    """Sums over tokens, float64.

    Query i and key j of a head have the weight w_ij of `sensitivity`; `gram` and `total` weigh
    every token by the mean over heads of what it receives.

    Attributes:
        gram: weighted sum of y y^T, y = [keys | values] without bias, [Y, Y].
        total: weighted sum of y, [Y].
        weight: the sum of the weights in `gram`, [].
        queries: weighted sum of q q^T, unrotated, bias and scale included, [H, d, d].
        phases: weighted sum of cos and sin of (query - key position) x inv_freq, [H, P, 2].
        head_weight: the sum of the weights in `phases`, [H].
        query_norms, key_norms: sums of the length of each rotary pair, unweighted, [H, P], [G, P].
    """

    gram: Tensor
    total: Tensor
    weight: Tensor
    queries: Tensor
    phases: Tensor
    head_weight: Tensor
    query_norms: Tensor
    key_norms: Tensor

    @classmethod
    def empty(cls, dense: DenseAttention) -> AttentionMoments:
        """Zero sums of the right sizes."""
        core, rotary = dense.config.core, dense.config.rotary
        heads, groups, d = core.heads, core.kv_heads, core.qk_head_dim
        width, pairs = groups * (d + core.v_head_dim), rotary.pairs if rotary else 0
        shapes = [
            (width, width), (width,), (), (heads, d, d), (heads, pairs, 2), (heads,),
            (heads, pairs), (groups, pairs),
        ]  # fmt: skip
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(
        self, dense: DenseAttention, x_BND: Tensor, y_BNY: Tensor, valid: Tensor | None
    ) -> None:
        """Add rows; `y_BNY` are their keys and values, `valid` [B, N] marks real tokens."""
        read_Hee = read_out(dense)  # not kept: all layers' together are large
        for row in range(x_BND.shape[0]):
            x, y = x_BND[row], y_BNY[row]
            if valid is not None:
                real = valid[row].bool()
                x, y = x[real], y[real]
            if len(x):
                self._add_row(dense, x[None], y.double().cpu(), read_Hee)

    def _add_row(
        self, dense: DenseAttention, x_1ND: Tensor, y_NY: Tensor, read_Hee: Tensor
    ) -> None:
        c = dense.config
        heads, groups, d, n = c.core.heads, c.core.kv_heads, c.core.qk_head_dim, x_1ND.shape[1]
        pairs = c.rotary.pairs if c.rotary else 0
        q = stream(dense.q_proj(x_1ND), heads, c.q, dense.q_norm, None, 0)[0].cpu()
        k = stream(dense.k_proj(x_1ND), groups, c.k, dense.k_norm, None, 0)[0].cpu()
        v = y_NY[:, groups * d :].unflatten(1, (groups, -1)).transpose(0, 1)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        received = torch.zeros(n, dtype=torch.float64)
        if c.rotary is not None:
            angle = _distances(n)[:, None] * torch.tensor(c.rotary.inv_freq, dtype=torch.float64)
        for g in range(groups):  # a group at a time: all heads' scores at once are large
            own = slice(g * heads // groups, (g + 1) * heads // groups)
            scores, seen = scored(dense, q[own].to(wide), k[g].to(wide), own)
            weight_hNN = sensitivity(scores, seen, v[g].to(wide), read_Hee[own].to(wide))
            received += weight_hNN.sum((0, 1)).double()
            by_query = weight_hNN.sum(2).double()
            self.head_weight[own] += by_query.sum(1)
            wide_q = q[own].double()
            self.queries[own] += torch.einsum("hni,hnj->hij", wide_q * by_query[..., None], wide_q)
            if pairs:
                by_distance = diagonal_sums(weight_hNN).double()
                turned = [by_distance @ angle.cos(), by_distance @ angle.sin()]
                self.phases[own] += torch.stack(turned, -1)
        received /= heads
        self.gram += y_NY.t() @ (y_NY * received[:, None])
        self.total += received @ y_NY
        self.weight += received.sum()
        for sums, z in ((self.query_norms, q), (self.key_norms, k)):
            z = z.double()
            sums += torch.hypot(z[..., :pairs], z[..., pairs : 2 * pairs]).sum(1)

    def part(self, y: Tensor, heads: list[int], groups: list[int]) -> AttentionMoments:
        """The sums of some heads; tokens keep the weight that all heads of the block gave them.

        Args:
            y: their rows of `gram`.
            heads: query heads.
            groups: key/value groups.
        """
        return AttentionMoments(
            self.gram[y][:, y], self.total[y], self.weight, self.queries[heads],
            self.phases[heads], self.head_weight[heads], self.query_norms[heads],
            self.key_norms[groups],
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """For storage beside the run."""
        return {f"attention.{name}": getattr(self, name) for name in _SUMS}

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> AttentionMoments | None:
        """The inverse of `tensors`; None where they were not collected."""
        if "attention.gram" not in stored:
            return None
        return cls(*(stored[f"attention.{name}"] for name in _SUMS))


_SUMS = tuple(f.name for f in fields(AttentionMoments))


def read_out(dense: DenseAttention) -> Tensor:
    """W_O,h^T W_O,h of every head, [H, e, e]; the identity where other steps come between."""
    core = dense.config.core
    e = core.v_head_dim
    if dense.config.out_features is None or dense.config.join is not None:
        return torch.eye(e, dtype=torch.float64).repeat(core.heads, 1, 1)
    weight = dense.get_parameter("o_proj.weight").detach().cpu()
    each = weight.unflatten(1, (core.heads, e)).unbind(1)
    return torch.stack([w.double().t() @ w.double() for w in each])


def scored(
    dense: DenseAttention, q_hNd: Tensor, k_Nd: Tensor, heads: slice
) -> tuple[Tensor, Tensor]:
    """Scores [h, N, N] of some heads of one group, and what their queries see [1, N, N]."""
    c, n = dense.config, q_hNd.shape[1]
    if c.rotary is not None:
        wide = torch.float64
        angle = torch.arange(n)[:, None] * torch.tensor(c.rotary.inv_freq, dtype=wide)
        turn = ((angle.cos() * c.rotary.scaling)[None], (angle.sin() * c.rotary.scaling)[None])
        q_hNd = rotate(q_hNd[None], turn, c.rotary.pairs)[0]
        k_Nd = rotate(k_Nd[None, None], turn, c.rotary.pairs)[0, 0]
    scores = q_hNd @ k_Nd.t() * c.core.scale
    if c.core.softcap:
        scores = c.core.softcap * torch.tanh(scores / c.core.softcap)
    added = dense.score_bias(n, n, 0)
    if added is not None:
        scores = scores + added[0][heads].to(scores)
    seen = visibility(None, c.core, n, n, scores[None])
    if seen is None:
        return scores, torch.ones(1, n, n, dtype=torch.bool)
    return scores, seen[0]


def sensitivity(scores_hNN: Tensor, seen_1NN: Tensor, v_Nd: Tensor, read_hee: Tensor) -> Tensor:
    """What a small error of each score costs at the block's output, [h, N, N].

    An error d of score (i, j) moves the output of query i by p_ij W_O (v_j - o_i) d to first order,
    o_i the head's own output. Its square is the weight; `SENSITIVE` of the head's sum, the rest is
    spread evenly, each query alike, over the keys it sees: to first order a key that gets no
    attention costs nothing, but an error can give it some.
    """
    p = scores_hNN.masked_fill(~seen_1NN, float("-inf")).softmax(-1)
    out = p @ v_Nd
    v_read = v_Nd @ read_hee
    squares = (v_read * v_Nd).sum(-1)[:, None] + ((out @ read_hee) * out).sum(-1)[..., None]
    first = (squares - 2 * out @ v_read.transpose(1, 2)).clamp_min_(0).mul_(p).mul_(p)
    per_query = first.sum((1, 2))[:, None, None] / first.shape[1]
    even = seen_1NN.to(p.dtype) / seen_1NN.sum(-1, keepdim=True)
    return first.mul_(SENSITIVE) + (1 - SENSITIVE) * per_query * even


def diagonal_sums(weight_HNN: Tensor) -> Tensor:
    """Sums over the diagonals [H, 2 N - 1], in the order of `_distances`."""
    heads, n, _ = weight_HNN.shape
    flat = F.pad(weight_HNN.flip(2), (0, n)).flatten(1)[:, : n * (2 * n - 1)]
    return flat.reshape(heads, n, 2 * n - 1).sum(1)


def _distances(n: int) -> Tensor:
    """Query minus key position of each diagonal of `diagonal_sums`."""
    return torch.arange(2 * n - 1, dtype=torch.float64) - (n - 1)
