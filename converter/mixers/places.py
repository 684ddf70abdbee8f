"""Where tokens stand in their sequence, and which are real, from the mask of a call.

Layout letters: B batch, N new tokens, M keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.errors import ArgumentError
from reattend.mixers.config import CoreConfig
from reattend.mixers.scores import own_pattern, shown


def valid_tokens(mask: Tensor | None, batch: int, n: int) -> Tensor | None:
    """Which of the N new tokens are real, [B, N]; None: all.

    From what the model passes for its layer: validity [B, M] ends with the new tokens; a mask
    [B, h, N, M] shows a real token its own key, whatever else it hides.

    Raises:
        ArgumentError: a mask has one row for several queries, which does not tell.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return (mask != 0)[:, -n:]
    if mask.shape[-2] != n:
        raise ArgumentError(
            f"a converted block was given a mask of {mask.shape[-2]} rows for {n} queries",
            next_step="pass a mask [batch, 1, query, key], validity [batch, key], or none",
        )
    own = torch.diagonal(shown(mask[:, 0]), mask.shape[-1] - n, dim1=-2, dim2=-1)
    return own.expand(batch, n)


def places(valid_BN: Tensor | None, n: int, device: Any, before_B: Tensor | None = None) -> Tensor:
    """Positions [B or 1, N] counted over real tokens, -1 for padding.

    Args:
        valid_BN: which tokens are real; None: all.
        n: tokens.
        device: for the result.
        before_B: real tokens before these.
    """
    if valid_BN is None:
        place = torch.arange(n, device=device)[None]
        return place if before_B is None else place + before_B[:, None]
    place = valid_BN.long().cumsum(-1) - 1
    if before_B is not None:
        place = place + before_B[:, None]
    return place.masked_fill(~valid_BN, -1)


def usual(mask: Tensor, place_BN: Tensor, core: CoreConfig) -> bool:
    """Whether a mask [B, h, N, M] hides the block's own pattern and padding, and nothing else.

    Looked at among the new tokens, the last N keys; rows of padding do not matter. False where it
    cannot be told: one row for several queries, or a traced call.
    """
    n = place_BN.shape[1]
    if torch.compiler.is_compiling() or mask.shape[-2] != n or mask.shape[-1] < n:
        return False
    i, j = place_BN[:, None, :, None], place_BN[:, None, None, :]
    expected = own_pattern(core, i, j) & (j >= 0)
    return bool(((shown(mask[..., -n:]) == expected) | (i < 0)).all())
