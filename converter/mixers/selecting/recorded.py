"""TidalDecode: a layer notes each head's best tokens, and the layers behind it read those.

Yang et al., arXiv 2410.05076. The notes are in the cache, beside the rows of the layer that made
them (`reattend.install.kept` hands a reading layer the memo of its source), so two texts that are
decoded in turns do not meet. What differs: every query head has its own tokens, as the paper says
and its kernels do not; nothing refreshes the cache in between.

Layout letters: as in `base`; K tokens noted.
"""

from __future__ import annotations

import torch

from reattend.errors import UnsupportedCacheError
from reattend.mixers.scores import own_pattern
from reattend.mixers.selecting.base import Asked, Method, Tokens
from reattend.patterns.selectors import Recorded


class RecordedMethod(Method):
    """See `Recorded`."""

    def __init__(self, selector: Recorded) -> None:
        super().__init__()
        self.selector = selector

    def choose(self, asked: Asked) -> Tokens:
        """Note, or read.

        Raises:
            UnsupportedCacheError: the layer that should have noted did not.
        """
        s, m = self.selector, asked.k_BGMd.shape[2]
        shape = (*asked.q_BHNd.shape[:3], m)
        if s.source is None:
            if s.layer in s.at and asked.notes is not None:
                i, j = asked.positions()
                scores = asked.scores(asked.q_BHNd, asked.k_BGMd)
                scores = scores.masked_fill(~own_pattern(asked.core, i, j), float("-inf"))
                best = scores.topk(min(s.topk, m)).indices
                # the query itself is always read, so its place fills what is missing
                missing = s.topk - best.shape[-1]
                asked.notes.write(torch.nn.functional.pad(best, (0, missing), value=m - 1))
            return Tokens(torch.ones(shape, dtype=torch.bool, device=asked.q_BHNd.device))
        noted = None if asked.notes is None else asked.notes.read()
        if noted is None:
            raise UnsupportedCacheError(
                f"layer {s.layer} reads the tokens that layer {s.source} chose, which chose none",
                next_step="convert both in one plan, whole blocks, with the same `at` and `topk`",
            )
        seen = torch.zeros(shape, dtype=torch.bool, device=asked.q_BHNd.device)
        return Tokens(seen.scatter(-1, noted, True))
