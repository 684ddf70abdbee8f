"""Text in which things have to be looked up, near and far: what finders measure heads on.

The second half of every row holds the pieces of the first in reverse order, so that what is
repeated stood between an eighth and seven eighths of the row before. With one distance alone a
window that is a little wider would do for every head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: pieces of a half, each repeated at a distance of its own
PIECES = 4


def sources(length: int) -> Tensor:
    """Where each token of the second half of a row stood before, [length // 2]."""
    return torch.cat(torch.arange(length // 2).tensor_split(PIECES)[::-1])


def repeated(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every row's second half replaced by pieces of its first.

    Rows of odd length lose their last token; other inputs stay as they are.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return batch
    again = sources(ids.shape[1]).to(ids.device)
    changed = {**batch, "input_ids": torch.cat([ids[:, : len(again)], ids[:, again]], 1)}
    for name in ("attention_mask", "position_ids", "token_type_ids"):
        if isinstance(batch.get(name), Tensor) and batch[name].shape[:2] == ids.shape:
            changed[name] = batch[name][:, : 2 * len(again)]
    return changed
