"""What the loss changes by when a head no longer sees a key: MoA's first-order influence.

Fu et al., arXiv 2406.14909. If entry (i, j) of the attention A is dropped and row i divided by what
remains, the loss changes to first order by

    E_ij = A_ij / (1 - A_ij) (sum_k G_ik A_ik - G_ij),    G = dL/dA = (dL/dO) V^T.

E is summed over square tiles, averaged with its sign over samples, and its absolute value is what a
tile is worth. A tile is worth to a KV head what it is worth to that query head of it which needs it
most, as published, so that one width serves all. Layout letters: H query heads, G KV heads, N
tokens, T tiles per side.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from reattend.errors import PlanError
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern
from reattend.passes.rewrite.base import Measure, Subject
from reattend.passes.rewrite.sparse_watch import Look, answering, watched
from reattend.patterns.pattern import HeadPattern

#: 1 - A at the least: where one key gets everything, its loss is no first-order matter
LEAST = 1e-4


def influences(
    sites: list[Subject], measure: Measure, length: int, rows: int, block: int
) -> dict[str, Tensor]:
    """What each tile of each KV head is worth at one length, [G, T, T] by path, nats per token.

    Args:
        sites: the blocks.
        measure: runs the model.
        length: tokens of the rows.
        rows: samples.
        block: tokens per side of a tile.

    Raises:
        PlanError: as `answering`, or the data has no row of that length.
    """
    sums: dict[str, Tensor] = {}

    def watch(path: str, look: Look, y: Tensor) -> Tensor:
        probe = torch.zeros_like(y, requires_grad=True)

        def arrived(leaf: Tensor) -> None:
            assert leaf.grad is not None
            sums[path] = sums.get(path, 0) + tiles(look, leaf.grad, block)
            leaf.grad = None

        probe.register_post_accumulate_grad_hook(arrived)
        probes.append(probe)
        return y + probe

    probes: list[Tensor] = []
    blocks = {s.path: watched(s.dense, partial(watch, s.path)) for s in sites}
    count = 0
    with answering("finder: profile", sites, measure, blocks, length, rows) as runs:
        runs = iter(runs)
        while True:
            with torch.enable_grad():
                run = next(runs, None)
            if run is None:
                break
            run.loss.backward(inputs=probes)
            probes.clear()
            count += 1
    if not count:
        raise PlanError(
            f"no calibration row has {length} tokens",
            where="finder: profile",
            next_step="give longer texts, or smaller profile.lengths",
        )
    groups = {s.path: (s.dense.config.core.kv_heads, -1) for s in sites}
    return {p: (sums[p] / count).abs().unflatten(0, shape).amax(1) for p, shape in groups.items()}


def tiles(look: Look, gradient_BHNe: Tensor, block: int) -> Tensor:
    """Signed influence summed over tiles and rows, [H, T, T], float64."""
    length = look.q.shape[2]
    side = -(-length // block)
    found = torch.zeros(look.core.heads, side, side, dtype=torch.float64)
    for head in range(look.core.kv_heads):
        v_B1eN = look.v[:, head : head + 1].transpose(-1, -2).to(gradient_BHNe.dtype)
        for here, a_BrnN in look.strips(head, block):
            g_BrnN = (gradient_BHNe[:, look.group(head), here] @ v_B1eN).to(a_BrnN.dtype)
            mean = (g_BrnN * a_BrnN).sum(-1, keepdim=True)
            e_BrnN = a_BrnN / (1 - a_BrnN).clamp_min(LEAST) * (mean - g_BrnN)
            pooled = pool(e_BrnN.sum(0), block).double().cpu()
            first = here.start // block
            found[look.group(head), first : first + pooled.shape[1]] += pooled
    return found


def pool(x_hnN: Tensor, block: int) -> Tensor:
    """Sums over tiles; the last ones may be smaller."""
    h, n, m = x_hnN.shape
    padded = pad(x_hnN, (0, -m % block, 0, -n % block))
    return padded.view(h, -(-n // block), block, -(-m // block), block).sum((2, 4))


@lru_cache(maxsize=256)
def hidden_shares(pattern: HeadPattern, core: CoreConfig, length: int, block: int) -> Tensor:
    """Share of each tile's pairs that a pattern hides of those the block shows, [T, T]."""
    j = torch.arange(length)[None]
    parts = []
    for start in range(0, length, block):
        i = torch.arange(start, min(start + block, length))[:, None]
        shown = own_pattern(core, i, j)
        both = torch.stack([shown & ~pattern.sees(i, j, core), shown]).double()
        hidden, visible = pool(both, block)
        parts.append(hidden / visible.clamp_min(1))
    return torch.cat(parts)


def predicted(
    worth_GTT: Tensor, pattern: HeadPattern, core: CoreConfig, length: int, block: int
) -> Tensor:
    """The loss that each KV head is predicted to cost with a pattern, [G], nats per token."""
    return (worth_GTT * hidden_shares(pattern, core, length, block)).sum((1, 2))
