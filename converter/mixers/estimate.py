"""Exact attention to the keys that a small trained network expects to matter.

SEA, Lee et al., arXiv 2310.01777. The outputs of a Performer and the values say, through a linear
layer and two convolutions over queries and columns (heads are channels), what every query pays to K
columns of keys; column j holds the keys i with floor(i K / M) = j of M. Each query attends by
softmax to the keys of its best columns, and a gate that starts at zero lets it fall back to the
mean value:

    y_n = softmax attention to the keys of the chosen columns + g_n (mean of values - that)

Choosing passes no gradient on. In training every call adds 0.1 KL + mean squared error of these
rows against the block's own attention, summed over columns: that forms all N M scores, so train on
short inputs. In the paper the gate is a sigmoid, and columns are widened by interpolation.

Layout letters: B batch, H query heads, G KV heads, N tokens, M real ones, K columns, d and e key
and value widths, i inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from reattend.mixers.estimated import Estimated
from reattend.mixers.everywhere_config import EverywhereConfig
from reattend.mixers.features import widened
from reattend.mixers.schooling import Schooled
from reattend.mixers.top_blocks import real_first

#: weight of the divergence beside the squared error, as in the paper's code
KL = 0.1


class Estimate(nn.Module, Schooled):
    """The network, and attention to what it chooses."""

    def __init__(
        self, config: EverywhereConfig, heads: tuple[int, int], width: int, value: int, rows: int
    ) -> None:
        """For H and G heads of these key and value widths; `rows`: features of the Performer."""
        super().__init__()
        self.config = config
        many, inner = config.estimate, 2 * value
        self.context = Estimated(EverywhereConfig(), heads[1], width, rows)
        self.enter, self.norm = nn.Linear(2 * value, inner), nn.LayerNorm(inner)
        self.columns = nn.Linear(inner, many)
        self.mix = nn.Conv2d(heads[0], heads[0], 3, padding=1)
        self.mend = nn.Conv2d(heads[0], heads[0], 3, padding=1)
        self.gate = nn.Linear(inner, 1)
        self.lessons: list[Tensor] = []

    def start(self) -> None:
        """From a generator of its own; what is added to rows, and the gate, start at zero."""
        self.context.start()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for part in (self.enter, self.columns, self.mix):
                bound = part.weight[0].numel() ** -0.5
                for x in (part.weight, part.bias):
                    assert isinstance(x, Tensor)
                    x.copy_(bound * (2 * torch.rand(x.shape, generator=generator) - 1))
            for last in (self.mend, self.gate):
                for x in last.parameters():
                    x.zero_()

    @property
    def anneals(self) -> bool:
        """The share of columns stays."""
        return False

    def trained(self, share: float) -> None:
        """Nothing changes with time."""

    def own_loss(self) -> Tensor | None:
        """How far estimated rows were from the block's own attention."""
        if not self.lessons:
            return None
        found = torch.stack(self.lessons).mean()
        self.lessons.clear()
        return found

    def forward(
        self, q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, scale: float, valid_BN: Tensor | None
    ) -> Tensor:
        """Outputs [B, H, N, e], in float32 or wider."""
        repeat, tokens = q_BHNd.shape[1] // k_BGNd.shape[1], real_first(valid_BN)
        q, k, v = (widened(tokens.sorted(x)) for x in (q_BHNd, k_BGNd, v_BGNe))
        n, count_B = q.shape[2], tokens.count_B
        if count_B is None:
            count_B = torch.tensor([n], device=q.device)
        real_BN = torch.arange(n, device=q.device) < count_B[:, None]
        given = None if valid_BN is None else real_BN
        k_all, v_all = (x.repeat_interleave(repeat, 1) for x in (k, v))
        context = self.context(*(x.detach() for x in (q, k, v)), scale, given)
        seen = torch.cat([context, v_all.detach()], -1)
        inner = F.gelu(self.norm(self.enter(seen.to(self.enter.weight.dtype))))
        z_BHNK = self._rows(inner, real_BN, count_B)
        if self.training and torch.is_grad_enabled():
            self.lessons.append(self._lesson(z_BHNK, q, k_all, scale, real_BN, count_B))
        near = self._near(z_BHNK.detach(), q, k_all, v_all, scale, real_BN, count_B)
        share = real_BN.to(v.dtype) / count_B.clamp_min(1)[:, None]
        mean = (v_all * share[:, None, :, None]).sum(2, keepdim=True)
        y: Tensor = tokens.back(near + self.gate(inner).to(near.dtype) * (mean - near))
        return y

    def _rows(self, inner_BHNi: Tensor, real_BN: Tensor, count_B: Tensor) -> Tensor:
        """Logarithms of the estimated rows, but for a constant, [B, H, N, K]; no key, no column."""
        real = real_BN[:, None, :, None]
        z = self.columns(inner_BHNi) * real
        z = z + self.mend(F.relu(self.mix(z)) * real)
        z = widened(z)
        begin, end = self._ends(torch.arange(z.shape[3], device=z.device), count_B[:, None])
        rows: Tensor = z.masked_fill((begin >= end)[:, None, None], torch.finfo(z.dtype).min)
        return rows

    def _ends(self, column: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The first key of columns, and the first behind them, of so many keys."""
        many = self.config.estimate
        return (column * count + many - 1) // many, ((column + 1) * count + many - 1) // many

    def _near(
        self, z_BHNK: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, real_BN: Tensor,
        count_B: Tensor,
    ) -> Tensor:  # fmt: skip
        """Softmax attention to the keys of the chosen columns, [B, H, N, e]."""
        (b, h, n, _), many = q.shape, self.config.estimate
        least = torch.finfo(q.dtype).min
        if self.config.sparse_top >= 1:
            scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~real_BN[:, None, None], least)
            every: Tensor = scores.softmax(-1) @ v
            return every
        column = z_BHNK.topk(self.config.top(many), -1).indices
        begin, end = self._ends(column, count_B[:, None, None, None])
        slot = torch.arange((n + many - 1) // many, device=q.device)
        place = begin[..., None] + slot
        none = (place >= end[..., None]).flatten(3)
        head = torch.arange(b * h, device=q.device).view(b, h, 1, 1) * n
        rows = (head + place.flatten(3).clamp_max(n - 1)).flatten()
        near_k, near_v = (
            x.flatten(0, 2).index_select(0, rows).view(*none.shape, x.shape[3]) for x in (k, v)
        )
        scores = (near_k @ q[..., None])[..., 0] * scale
        p = scores.masked_fill(none, least).softmax(-1)
        y: Tensor = (p[..., None, :] @ near_v)[..., 0, :]
        return y

    def _lesson(
        self, z_BHNK: Tensor, q: Tensor, k: Tensor, scale: float, real_BN: Tensor, count_B: Tensor
    ) -> Tensor:
        """The distance of estimated rows from attention, mean over real queries."""
        many, n = self.config.estimate, q.shape[2]
        with torch.no_grad():
            least = torch.finfo(q.dtype).min
            scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~real_BN[:, None, None], least)
            key = torch.arange(n, device=q.device)
            column = (key * many // count_B.clamp_min(1)[:, None]).clamp_max(many - 1)
            paid = scores.softmax(-1) @ F.one_hot(column, many).to(q.dtype)[:, None]
        apart = (paid * (paid.clamp_min(1e-12).log() - z_BHNK.log_softmax(-1))).sum(-1)
        square = (paid - z_BHNK.softmax(-1)).square().mean(-1)
        real = real_BN[:, None].expand_as(apart)
        return (KL * apart + square)[real].mean()
