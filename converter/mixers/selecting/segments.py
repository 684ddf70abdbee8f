"""DHSA: chunks that end where a trained predictor says, ranked by their mean keys, read by tokens.

Dynamic hierarchical sparse attention, Xiong et al., arXiv 2510.24606, first release. The predictor
is its convolutional one: both windows of a gap through one encoder, then a small network over the
two codes, their difference, their product and their cosine. What differs: every KV head has ends
and scores of its own; ends are the likeliest gaps near them and above `theta`, not the likeliest of
the whole text; queries choose one by one. A gap is an end or not once the tokens near it are there,
so what a query reads never depends on later tokens, and decoding chooses as one pass does.

Layout letters: as in `base`; T gaps, u `window`, w `hidden`, C chunks.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked, Learner, Tokens, Whole
from reattend.patterns.learned import Segments

#: how steeply the paper's soft labels rise with the logarithm of the ratio
STEEP = 4.0


class SegmentsMethod(Learner):
    """See `Segments`.

    Attributes:
        mixed_Gdu, mixed_Gd: over the positions of a window, and its bias.
        code_Gdw, code_Gw: of a window, and its bias.
        fused_Gfw, fused_Gw: from the two codes and how they compare, f = 4 w + 1.
        ends_Gw, ends_G: to the logit of a gap.
    """

    block, pairwise = 1, True
    mixed_Gdu: nn.Parameter
    mixed_Gd: nn.Parameter
    code_Gdw: nn.Parameter
    code_Gw: nn.Parameter
    fused_Gfw: nn.Parameter
    fused_Gw: nn.Parameter
    ends_Gw: nn.Parameter
    ends_G: nn.Parameter

    def __init__(self, selector: Segments, core: CoreConfig) -> None:
        super().__init__()
        self.selector = selector
        d, w, groups = core.qk_head_dim, selector.hidden, core.kv_heads
        for name, shape in {
            "mixed_Gdu": (d, selector.window), "mixed_Gd": (d,), "code_Gdw": (d, w),
            "code_Gw": (w,), "fused_Gfw": (4 * w + 1, w), "fused_Gw": (w,), "ends_Gw": (w,),
            "ends_G": (),
        }.items():  # fmt: skip
            zeros = torch.zeros(groups, *shape)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    @torch.no_grad()
    def start(self) -> None:
        """Random codes of windows; the logit is how unlike they are: STEEP (1 - cosine)."""
        generator = torch.Generator().manual_seed(0)
        for x, inside in (
            (self.mixed_Gdu, self.selector.window), (self.code_Gdw, self.code_Gdw.shape[1]),
            (self.fused_Gfw, self.fused_Gfw.shape[1]),
        ):  # fmt: skip
            x.copy_(torch.randn(x.shape, generator=generator) * inside**-0.5)
        self.fused_Gfw[:, :, 0] = 0
        self.fused_Gfw[:, -1, 0], self.fused_Gw[:, 0] = -1, 1
        self.ends_Gw[:, 0] = STEEP

    def logits(self, k_BGMd: Tensor) -> Tensor:
        """Of gaps between whole windows [B, G, M + 1 - 2 u]; the first is behind token u - 1."""
        u = self.selector.window
        dtype = torch.float64 if k_BGMd.dtype == torch.float64 else torch.float32
        weight = {name: p.to(dtype) for name, p in self.named_parameters()}
        windows = k_BGMd.to(dtype).unfold(2, u, 1)  # [B, G, M + 1 - u, d, u]
        mixed = torch.einsum("bgmdu,gdu->bgmd", windows, weight["mixed_Gdu"])
        mixed = (mixed + weight["mixed_Gd"][:, None]).relu()
        code = (mixed @ weight["code_Gdw"] + weight["code_Gw"][:, None]).relu()
        left, right = code[:, :, : code.shape[2] - u], code[:, :, u:]
        cosine = nn.functional.cosine_similarity(left, right, dim=-1, eps=1e-6)[..., None]
        fused = torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)
        fused = (fused @ weight["fused_Gfw"] + weight["fused_Gw"][:, None]).relu()
        found: Tensor = (fused * weight["ends_Gw"][:, None]).sum(-1) + weight["ends_G"][:, None]
        return found

    def summarise(self, whole: Whole) -> Tensor:
        """Of token t: the logit of the gap behind token t - u; -inf where there is none."""
        u, count = self.selector.window, whole.k_BGQcd.shape[2]
        known = whole.k_BGMd[:, :, max(0, whole.number - 2 * u + 1) :]
        shape = (*known.shape[:2], count)
        if known.shape[2] < 2 * u:
            return known.new_full((*shape, 1), float("-inf"))
        found = self.logits(known)
        return nn.functional.pad(found, (count - found.shape[2], 0), value=float("-inf"))[..., None]

    def choose(self, asked: Asked) -> Tokens:
        """Chunks by their mean keys, then tokens."""
        s, told = self.selector, asked.summaries_BGQw
        told = self.summarise(asked.whole(1)) if told is None else told
        chunk_BGM, last_BGC = self._chunks(told[..., 0])
        group = asked.core.heads // asked.core.kv_heads
        scores = asked.scores(asked.q_BHNd, _pooled(asked.k_BGMd, chunk_BGM, last_BGC.shape[-1]))

        i, j = asked.positions()
        seen_NM = own_pattern(asked.core, i, j)
        closed_BGNC = last_BGC[:, :, None] + s.delay <= i
        place = chunk_BGM[:, :, None].expand(-1, -1, len(i), -1)
        in_closed = closed_BGNC.gather(-1, place)
        free = seen_NM & in_closed & (i - j >= s.local)
        sure = seen_NM & ~free
        visible_N1 = seen_NM.sum(-1, keepdim=True)
        budget = visible_N1.clamp(max=s.topk) if s.topk else (visible_N1 * (s.ratio or 1)).ceil()
        left_BGN1 = budget - sure.sum(-1, keepdim=True)

        # tokens of a chunk that may be chosen; before a chunk in its query's order; behind a token
        upto_BGNM = free.cumsum(-1)
        end = last_BGC.clamp(max=free.shape[-1] - 1)[:, :, None].expand(-1, -1, len(i), -1)
        upto_BGNC = upto_BGNM.gather(-1, end)
        size_BGNC = upto_BGNC.diff(dim=-1, prepend=torch.zeros_like(upto_BGNC[..., :1]))
        size_BHNC = size_BGNC.repeat_interleave(group, 1)
        scores = scores.masked_fill(size_BHNC == 0, float("-inf"))
        order = scores.argsort(dim=-1, descending=True, stable=True)
        sizes = size_BHNC.gather(-1, order)
        before = torch.empty_like(sizes).scatter(-1, order, sizes.cumsum(-1) - sizes)
        behind = upto_BGNC.gather(-1, place) - upto_BGNM
        room = (left_BGN1 - behind).repeat_interleave(group, 1)
        taken = before.gather(-1, place.repeat_interleave(group, 1)) < room
        return Tokens(taken & free.repeat_interleave(group, 1) | sure.repeat_interleave(group, 1))

    def _chunks(self, told_BGM: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk of each token [B, G, M], and the last token of each chunk [B, G, C]."""
        s, m = self.selector, told_BGM.shape[-1]
        none = float("-inf")
        # at g: the gap behind token g
        gap = nn.functional.pad(told_BGM[..., s.window :], (0, min(s.window, m)), value=none)
        ends = gap > STEEP * log(s.theta)
        if s.apart:
            pad = nn.functional.pad(gap, (s.apart, s.apart), value=none)
            near = pad.unfold(-1, s.apart, 1).amax(-1)  # at x: gaps x - apart .. x - 1
            ends = ends & (gap > near[..., :m]) & (gap >= near[..., s.apart + 1 :])
        at = torch.arange(m, device=gap.device)
        ends = ends | ((at + 1) % s.longest == 0)
        chunk = ends.cumsum(-1) - ends.long()
        many = int(chunk.max()) + 1
        # of the last chunk the end is not known
        last = torch.full(
            (*chunk.shape[:2], many), torch.iinfo(torch.long).max // 2, device=at.device
        )
        return chunk, last.scatter_reduce(-1, chunk, torch.where(ends, at, last[..., :1]), "amin")


def _pooled(k_BGMd: Tensor, chunk_BGM: Tensor, many: int) -> Tensor:
    """Mean keys x sqrt(tokens) of chunks [B, G, C, d]; of none: 0."""
    shape = (*k_BGMd.shape[:2], many)
    sums = k_BGMd.new_zeros(*shape, k_BGMd.shape[3])
    sums = sums.scatter_add(2, chunk_BGM[..., None].expand_as(k_BGMd), k_BGMd)
    tokens = k_BGMd.new_zeros(shape).scatter_add(2, chunk_BGM, torch.ones_like(k_BGMd[..., 0]))
    return sums * tokens.clamp_min(1)[..., None] ** -0.5
