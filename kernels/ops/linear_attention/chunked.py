"""`reattend::linear_attention` in chunks: pairs inside of a chunk, the state between chunks.

Work grows linearly with the tokens. Yang et al., arXiv 2312.06635, section 3. Everything is in the
compute dtype here, and nothing is normalised. Letters as in `reference.py`; T chunks of C tokens, L
keys of a band: a chunk, or a chunk and the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from reattend.kernels.linear_attention.reference import last_seen

#: Tokens of a chunk, at least.
CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """Where chunks begin, and what a band is.

    Attributes:
        n: tokens.
        size: tokens of a chunk, C.
        count: chunks, T.
        wide: a band is two chunks, and the state is that before both.
    """

    n: int
    size: int
    count: int
    wide: bool
    lag: int
    block: int

    @staticmethod
    def of(n: int, lag: int, block: int) -> Chunks:
        """Chunks of whole blocks, so long that no query sees anything of its band's end only."""
        least = max(CHUNK, lag - 1)
        size = -(-least // block) * block
        return Chunks(n, size, -(-n // size), lag > 1, lag, block)

    @property
    def paired(self) -> bool:
        """Whether a query sees any key of its band; terraces of a chunk see none."""
        last = (self.size - 1) // self.block * self.block - self.lag
        return last >= (-self.size if self.wide else 0)

    def cut(self, x: Tensor) -> Tensor:
        """[.., N, w] -> [.., T, C, w], zeros behind the end."""
        padded = F.pad(x, (0, 0, 0, self.count * self.size - self.n))
        parts: Tensor = padded.unflatten(-2, (self.count, self.size))
        return parts

    def joined(self, x: Tensor) -> Tensor:
        """[.., T, C, w] -> [.., N, w]."""
        return x.flatten(-3, -2)[..., : self.n, :]

    def band(self, x: Tensor) -> Tensor:
        """[.., T, C, w] -> [.., T, L, w]: what is before a chunk, and the chunk."""
        if not self.wide:
            return x
        return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[..., :-1, :, :], x], -2)

    def folded(self, x: Tensor) -> Tensor:
        """The transpose of `band`: what bands give to their chunks, summed."""
        if not self.wide:
            return x
        before, own = x.split(self.size, -2)
        y: Tensor = own + F.pad(before, (0, 0, 0, 0, 0, 1))[..., 1:, :, :]
        return y

    def seen(self, device: torch.device) -> Tensor:
        """Which keys of its band a query sees, [C, L]; the same in every chunk."""
        shift = self.size if self.wide else 0
        key_L = torch.arange(-shift, self.size, device=device)
        return key_L[None] <= last_seen(self.size, self.lag, self.block, device)[:, None]


@dataclass(frozen=True)
class Decays:
    """Running sums of the decays inside of each chunk.

    `within`: up to and with each token [B, G, T, C]; `whole`: over each chunk [B, G, T].
    """

    within: Tensor
    whole: Tensor

    @staticmethod
    def of(decay_BGN: Tensor | None, chunks: Chunks) -> Decays | None:
        """None where nothing decays."""
        if decay_BGN is None:
            return None
        within = chunks.cut(decay_BGN[..., None])[..., 0].cumsum(-1)
        return Decays(within, within[..., -1])


def weights(decays: Decays | None, chunks: Chunks, device: torch.device) -> Tensor:
    """What is left of each key of a band when its query comes, 0 where it is not seen."""
    seen = chunks.seen(device)
    if decays is None:
        return seen
    key = decays.within
    if chunks.wide:
        before = F.pad(key - decays.whole[..., None], (0, 0, 1, 0))[..., :-1, :]
        key = torch.cat([before, key], -1)
    apart = decays.within[..., :, None] - key[..., None, :]
    return torch.where(seen, apart.masked_fill(~seen, 0).exp(), 0)[:, :, None]


def scanned(step_BGTfe: Tensor, first_BGfe: Tensor, decays: Decays | None) -> list[Tensor]:
    """``s_0 = first``, ``s_t+1 = exp(whole_t) s_t + step_t``: T + 1 states."""
    states = [first_BGfe]
    for t in range(step_BGTfe.shape[2]):
        left = states[-1]
        if decays is not None:
            left = left * decays.whole[:, :, t, None, None].exp()
        states.append(left + step_BGTfe[:, :, t])
    return states


def forward(
    q_BHNf: Tensor,
    k_BGNf: Tensor,
    v_BGNe: Tensor,
    decay_BGN: Tensor | None,
    state_BGfe: Tensor,
    lag: int,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Outputs and the state after all keys; arguments as in `reference.linear_attention`."""
    if q_BHNf.shape[2] == 1:
        return step(q_BHNf, k_BGNf, v_BGNe, decay_BGN, state_BGfe, lag)
    chunks = Chunks.of(q_BHNf.shape[2], lag, block)
    decays = Decays.of(decay_BGN, chunks)
    q = chunks.cut(q_BHNf.unflatten(1, (k_BGNf.shape[1], -1)))
    k, v = chunks.cut(k_BGNf), chunks.cut(v_BGNe)
    left = k if decays is None else k * (decays.whole[..., None] - decays.within).exp()[..., None]
    states = scanned(left.transpose(-1, -2) @ v, state_BGfe, decays)
    now = q if decays is None else q * decays.within.exp()[:, :, None, ..., None]
    y = now @ read_states(states, decays, chunks)[:, :, None]
    if chunks.paired:
        scores = q @ chunks.band(k).transpose(-1, -2)[:, :, None]
        y = y + (scores * weights(decays, chunks, q.device)) @ chunks.band(v)[:, :, None]
    return chunks.joined(y).flatten(1, 2), states[-1]


def read_states(states: list[Tensor], decays: Decays | None, chunks: Chunks) -> Tensor:
    """The state that the queries of each chunk read, [B, G, T, f, e], as it is before the chunk."""
    if not chunks.wide:
        return torch.stack(states[:-1], 2)
    older = torch.stack([states[0], *states[: chunks.count - 1]], 2)
    if decays is None:
        return older
    since = F.pad(decays.whole, (1, 0))[..., :-1]
    return older * since[..., None, None].exp()


def step(
    q_BH1f: Tensor,
    k_BG1f: Tensor,
    v_BG1e: Tensor,
    decay_BG1: Tensor | None,
    state_BGfe: Tensor,
    lag: int,
) -> tuple[Tensor, Tensor]:
    """One token."""
    old = state_BGfe if decay_BG1 is None else state_BGfe * decay_BG1[..., None].exp()
    new = old + k_BG1f.transpose(-1, -2) * v_BG1e
    grouped = q_BH1f.unflatten(1, (k_BG1f.shape[1], -1))[..., 0, :]
    y = grouped @ (old if lag else new)
    return y.flatten(1, 2)[:, :, None], new
