"""Dynamic mask attention: the tokens whose values score best, the same for every query behind them.

Shi et al., arXiv 2508.02124. What differs: the paper adds exp(score) to the logits of what is kept;
here scores choose and add nothing, so that a budget that covers everything is the original. A query
always reads itself. Of equal scores the later token is the better one.

Layout letters: as in `base`; f numbers of the values of all KV heads of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked, Learner, Tokens, Whole
from reattend.mixers.selecting.budget import within
from reattend.patterns.learned import Values


class ValuesMethod(Learner):
    """See `Values`."""

    block, pairwise = 1, True
    rate_Gf: nn.Parameter
    gain_G: nn.Parameter

    def __init__(self, selector: Values, core: CoreConfig) -> None:
        super().__init__()
        self.selector = selector
        groups = core.kv_heads
        for name, shape in (("rate_Gf", (groups, groups * core.v_head_dim)), ("gain_G", (groups,))):
            zeros = torch.zeros(*shape)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    @torch.no_grad()
    def start(self) -> None:
        """No gain, as in the paper: all tokens are equal, and the last ones are read."""
        generator = torch.Generator().manual_seed(0)
        rate = torch.randn(self.rate_Gf.shape, generator=generator)
        self.rate_Gf.copy_(rate * self.rate_Gf.shape[1] ** -0.5)
        self.gain_G.zero_()

    def scores(self, v_BGMe: Tensor) -> Tensor:
        """Of every token for every KV head [B, G, M], float32 or wider."""
        flat_BMf = v_BGMe.transpose(1, 2).flatten(2)
        wide = torch.float64 if flat_BMf.dtype == torch.float64 else torch.float32
        rate, gain = self.rate_Gf.to(wide), self.gain_G.to(wide)
        found = nn.functional.softplus(flat_BMf.to(wide) @ rate.t()) * gain
        return found.transpose(1, 2)

    def summarise(self, whole: Whole) -> Tensor:
        """The score of every token."""
        return _ranked(self.scores(whole.v_BGQce[..., 0, :]))[..., None]

    def choose(self, asked: Asked) -> Tokens:
        """The best tokens before each query, and itself."""
        told = asked.summaries_BGQw
        if told is None:
            assert asked.v_BGMe is not None
            told = _ranked(self.scores(asked.v_BGMe))[..., None]
        # places in the order of scores: no two are equal, however many tokens there are
        order = told[..., 0].argsort(dim=-1, stable=True)
        rank_BGM = order.argsort(dim=-1).to(torch.float32)
        i, j = asked.positions()
        seen = own_pattern(asked.core, i, j)
        rank_BGNM = rank_BGM[:, :, None].expand(-1, -1, len(i), -1)
        chosen = within(rank_BGNM, seen, self.selector, i == j)
        return Tokens(chosen.repeat_interleave(asked.core.heads // asked.core.kv_heads, 1))


def _ranked(score_BGM: Tensor) -> Tensor:
    """Scores as they are compared: in the steps of float16.

    In a first layer all occurrences of a token have the same values, and so one score. How a matrix
    product rounds depends on how many rows it has, so without steps prompts and single tokens, or
    two runtimes, would choose different ones. With them only scores at a step's edge can.
    """
    most = torch.finfo(torch.float16).max
    return score_BGM.clamp(-most, most).to(torch.float16).to(score_BGM.dtype)
