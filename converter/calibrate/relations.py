"""Relations between tokens: what queries, keys or values say of one another, whatever their width.

MiniLM (Wang et al., arXiv 2002.10957) compares softmax(V V^T / sqrt d) of teacher and student,
MiniLM v2 (arXiv 2012.15828) also Q-Q and K-K; heads are laid side by side and cut anew into
relation heads, so the student may have fewer. Both make queries, keys and values of the very input
of the teacher's block, rotated and normalised as their scores read them.

Layout letters: B batch, N tokens, H heads, A relation heads, d head width, a width of a relation
head, R real tokens of one row, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reattend.calibrate.losses import row_divergence
from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.plan_sections import Calibrate

#: rows of relations formed at a time
CHUNK = 512


class Relations:
    """The loss of `Calibrate.relations`, for blocks whose queries, keys and values can be compared.

    Args:
        settings: the plan's section.
        originals: normal forms of the teacher's blocks by path, on the teacher's tensors.
    """

    def __init__(self, settings: Calibrate, originals: Mapping[str, DenseAttention]) -> None:
        self.settings, self.originals = settings, originals
        self._call: tuple[Any, ...] = ()

    @contextmanager
    def listening(self, mixer: nn.Module) -> Iterator[None]:
        """Keep what a block is given, for `loss`."""

        def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
            self._call = given

        handle = mixer.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def loss(self, path: str, mixer: Any, real_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the call listened to: weighted divergences, summed over tokens, and how many tokens.

        Args:
            path: the block.
            mixer: the student's.
            real_BN: the tokens that count; None counts all.
        """
        x_BND, ctx, original = self._call[0], self._call[1], self.originals[path]
        with torch.no_grad():
            target = _streams(original, x_BND, ctx)
        guess = _streams(mixer, x_BND, ctx)
        if real_BN is None:
            real_BN = torch.ones(x_BND.shape[:2], dtype=torch.bool, device=x_BND.device)
        parts = []
        rotary = original.config.rotary
        for name in self.settings.relations:
            pairs = 0 if name == "v" or rotary is None else rotary.pairs
            heads = relation_heads(self.settings, name, original.config, mixer.config)
            assert isinstance(heads, int)
            mine, its = (split(streams[name], heads, pairs) for streams in (guess, target))
            parts.append(relation_divergence(mine, its, real_BN) / heads)
        total = self.settings.relation_weight * torch.stack(parts).sum()
        return total, real_BN.sum()


def _streams(mixer: Any, x_BND: Tensor, ctx: Any) -> dict[str, Tensor]:
    (q, *_), (k, v) = mixer.project(x_BND, x_BND, ctx, None)
    return {"q": q, "k": k, "v": v}


def unrelated(settings: Calibrate, before: DenseConfig, after: Frozen | None) -> str | None:
    """Why a block's queries, keys and values cannot be compared with the original's, or None.

    Args:
        settings: the plan's `calibrate` section.
        before: the original block.
        after: what it becomes; None where that is not known before statistics.
    """
    if not settings.relations or not settings.trains:
        return None
    if not isinstance(after, DenseConfig):
        return (
            "calibrate.relations compares queries, keys and values with the original's, and what "
            "this block becomes has not its own heads of them; drop relations"
        )
    if before.cross:
        return (
            "calibrate.relations needs to know which tokens are padding, and its keys and values "
            "come from another stream; drop relations"
        )
    found = (relation_heads(settings, name, before, after) for name in settings.relations)
    return next((why for why in found if isinstance(why, str)), None)


def relation_heads(
    settings: Calibrate, name: str, before: DenseConfig, after: DenseConfig
) -> int | str:
    """A of one stream, or why there is none: as the plan says, else so that no head is cut."""
    widths, counts = [], []
    for core in (before.core, after.core):
        counts.append(core.heads if name == "q" else core.kv_heads)
        widths.append(counts[-1] * (core.v_head_dim if name == "v" else core.qk_head_dim))
    heads = settings.relation_heads
    if heads is None:
        return gcd(*counts)
    if any(width % heads for width in widths):
        shown = " and ".join(map(str, widths))
        return (
            f"calibrate.relation_heads: {heads} does not divide the {shown} numbers of {name} "
            f"before and after; use a divisor of {gcd(*widths)}"
        )
    return heads


def split(x_BHNd: Tensor, heads: int, pairs: int) -> Tensor:
    """Heads side by side, cut anew: [B, A, N, a]. Both halves of a rotated pair stay together."""
    if pairs:
        turned_BHNd = x_BHNd[..., : 2 * pairs].unflatten(-1, (2, pairs)).mT.flatten(-2)
        x_BHNd = torch.cat([turned_BHNd, x_BHNd[..., 2 * pairs :]], -1)
    x_BNp = x_BHNd.transpose(1, 2).flatten(2)
    cut: Tensor = x_BNp.unflatten(-1, (heads, -1)).transpose(1, 2)
    return cut


class _RelationDivergence(torch.autograd.Function):
    """Sum over rows of relations of KL(teacher || student); some rows of one head at a time."""

    @staticmethod
    def forward(ctx: Any, student_BANa: Tensor, teacher_BANa: Tensor, real_BN: Tensor) -> Tensor:
        wide = torch.float64 if student_BANa.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=torch.float64, device=student_BANa.device)
        gradient = torch.zeros_like(student_BANa)
        for row, real_N in enumerate(real_BN):
            for head in range(student_BANa.shape[1]):
                mine_Ra = student_BANa[row, head, real_N].to(wide)
                its_Ra = teacher_BANa[row, head, real_N].to(wide)
                scale, its_scale = (x.shape[-1] ** -0.5 for x in (mine_Ra, its_Ra))
                grown_Ra = torch.zeros_like(mine_Ra)
                for begin in range(0, len(mine_Ra), CHUNK):
                    chunk = slice(begin, begin + CHUNK)
                    apart, off_CR = row_divergence(
                        mine_Ra[chunk] @ mine_Ra.T * scale, its_Ra[chunk] @ its_Ra.T * its_scale
                    )
                    total += apart
                    grown_Ra[chunk] += off_CR @ mine_Ra * scale
                    grown_Ra += off_CR.T @ mine_Ra[chunk] * scale
                gradient[row, head, real_N] = grown_Ra.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def relation_divergence(student_BANa: Tensor, teacher_BANa: Tensor, real_BN: Tensor) -> Tensor:
    """Sum over relation heads and real tokens of KL(softmax(T T^T / sqrt a) || that of S), in nats.

    No more than `CHUNK` rows of one head's relations exist at a time: the gradient is formed with
    the value, as in `losses.divergence`. Padded tokens are neither rows nor columns.

    Args:
        student_BANa: queries, keys or values by relation head.
        teacher_BANa: likewise, of any width; no gradient.
        real_BN: True where the token counts.
    """
    total: Tensor = _RelationDivergence.apply(  # type: ignore[no-untyped-call]
        student_BANa, teacher_BANa.detach(), real_BN
    )
    return total
