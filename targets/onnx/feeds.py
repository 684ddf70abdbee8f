"""What a call feeds besides the states: token ids, the mask over all tokens so far, positions."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Progress:
    """How far a batch has come. Padding stands on the left, so one number per row says it all.

    Letters: B batch, N new tokens, T tokens so far with the new ones.

    Args:
        mask_BT: of the prompt, 0 for padding, 1 for tokens.

    Attributes:
        seen: tokens before the next call.
    """

    def __init__(self, mask_BT: Array) -> None:
        self.seen = 0
        self.pads_B1 = (mask_BT == 0).sum(1, keepdims=True)
        self._mask = mask_BT

    def feeds(self, ids: Array) -> dict[str, Array]:
        """The inputs of a call with [B, N] more tokens.

        The mask [B, T] is the beginning of a longer one, for one row without a copy: what a step
        costs here does not grow with T.
        """
        total = self.seen + ids.shape[1]
        if self._mask.shape[1] < total:
            self._mask = (np.arange(2 * total) >= self.pads_B1).astype(np.int64)
        position = np.maximum(np.arange(self.seen, total) - self.pads_B1, 0)
        mask = np.ascontiguousarray(self._mask[:, :total])
        return {"input_ids": ids, "attention_mask": mask, "position_ids": position}
