"""Data parallelism: every process takes its share of each batch and gradients are summed.

accelerate starts the process group (torchrun or `accelerate launch`; gloo on CPU). Losses are
normalised by counts summed over all processes, so the result is that of one process up to the
order of summation. One process needs no group, and every method is then the identity.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reattend.calibrate.stream import Batch


class Ranks:
    """The processes that calibrate together; `rank` 0 publishes and reports."""

    def __init__(self, device: torch.device) -> None:
        self.world, self.rank = 1, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device.type == "cpu")
            self.world, self.rank = state.num_processes, state.process_index

    @property
    def main(self) -> bool:
        """Whether this process writes checkpoints and sends events."""
        return self.rank == 0

    def share(self, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """This process' rows; a process that gets none runs row 0 and must not count it."""
        rows = len(next(iter(batch.inputs.values())))
        silent = self.rank >= rows
        pick = slice(0, 1) if silent else slice(self.rank, None, self.world)
        return {name: tensor[pick] for name, tensor in batch.inputs.items()}, silent

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each scalar summed over all processes, float64."""
        if self.world == 1:
            return values
        from accelerate.utils import reduce

        total: Any = reduce(torch.stack([v.detach().double() for v in values]), "sum")
        return tuple(total.unbind())

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum `.grad` over all processes in place."""
        if self.world == 1:
            return
        from accelerate.utils import reduce

        for p in parameters:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = reduce(gradient, "sum")

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite every process' tensors with those of rank 0."""
        if self.world == 1:
            return
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(broadcast(tensor.clone(), from_process=0))
