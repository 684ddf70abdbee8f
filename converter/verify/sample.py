"""The rows on which blocks are compared after a conversion."""

from __future__ import annotations

from typing import Any

from torch import nn

from reattend.at_once import rows_at_once
from reattend.data import Dataset
from reattend.host import beside
from reattend.inputs import made_up
from reattend.materials import Materials


def sample_of(model: nn.Module, materials: Materials, inputs: Any) -> dict[str, Any]:
    """Arguments of one call, beside the model.

    Args:
        model: the original.
        materials: up to four rows held back, else of those the statistics read.
        inputs: example arguments, used where there is no data; None: made up.
    """
    data: Dataset | None = materials.held_out or materials.statistics
    if data is not None:
        length = next(iter(data.blocks[0].values())).shape[-1]
        rows = rows_at_once(model, length, most=4)
        return beside(model, next(iter(data.batches(rows))))
    return beside(model, inputs if inputs is not None else made_up(model))
