"""Several processes: every one takes its share of each batch and gradients are summed.

accelerate starts the process group (torchrun or `accelerate launch`; gloo on CPU). Losses are
normalised by counts summed over all processes, so the result is that of one process up to the
order of summation. One process needs no group, and every method is then the identity.
"""

from __future__ import annotations

import atexit
import gc
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from reattend.calibrate import shards
from reattend.calibrate.stream import Batch
from reattend.processes import several

SETTLING = 0.2  # seconds


class Ranks:
    """The processes that calibrate together; `rank` 0 publishes and reports.

    Attributes:
        world: number of processes.
        rank: number of this one.
        sharded: stages that can spread parameters over the processes do (`calibrate/shards.py`).

    Raises:
        ArgumentError: accelerate's environment asks for something that is not supported.
    """

    def __init__(self, device: torch.device) -> None:
        self.world, self.rank, self.sharded = 1, 0, False
        if several():
            self.sharded = shards.wanted()
            from accelerate import PartialState

            atexit.unregister(_settle)
            atexit.register(_settle)
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
        """Sum `.grad` over all processes in place; sharded ones hold the mean already."""
        if self.world == 1:
            return
        from accelerate.utils import reduce

        for p in parameters:
            if shards.is_sharded(p):
                if p.grad is not None:
                    p.grad.mul_(self.world)
                continue
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = reduce(gradient, "sum")

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite every process' tensors, none of them sharded, with those of rank 0."""
        for tensor in tensors:
            self.give(tensor, tensor)

    def give(self, target: Tensor, full: Tensor | None) -> None:
        """Set `target`, sharded or not, to rank 0's whole tensor `full`; others may pass None."""
        if self.world > 1:
            from accelerate.utils import broadcast

            mine = torch.empty(target.shape, dtype=target.dtype) if full is None else full
            mine = mine.detach().to(target.device).clone()
            full = broadcast(mine, from_process=0)
        assert full is not None
        shards.fill(target, full)


def agreed(mine: bool, device: torch.device) -> bool:
    """What the first process found, in all of them."""
    found = torch.tensor(int(mine), device=device)
    Ranks(device).same([found])
    return bool(found)


def _settle() -> None:
    """At exit: gloo's threads put their last tensors down while Python still lives.

    One that does so while the interpreter is torn down aborts the process, after all work is done
    and well (pytorch/pytorch#179291). torch offers no way to wait for them: idle, they need
    microseconds.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
    time.sleep(SETTLING)
