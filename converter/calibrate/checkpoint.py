"""Checkpoints of a running stage: weights, AdamW moments, random state and progress.

Two files take turns (`.0` and `.1`) and a JSON record, published last, names the valid one: a
kill between the two leaves the record of the checkpoint before, whose tensors are still there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reattend.calibrate.shards import is_sharded, whole
from reattend.errors import OutputError
from reattend.workdir import Workdir

FOLDER = "work/calibrate"


@dataclass
class Progress:
    """Where a stage is.

    Attributes:
        step, tokens: optimiser steps done, real tokens seen by this stage.
        position: next batch of the stream.
        points: (tokens seen, mean loss since the point before).
        window: sum and number of the losses since the last point.
        first, last: per group, loss of the first batch and running mean.
        complete: the stage has used its budget.
    """

    step: int = 0
    tokens: int = 0
    position: int = 0
    points: list[tuple[int, float]] = field(default_factory=list)
    window: tuple[float, int] = (0.0, 0)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Progress:
        """The inverse of `asdict` after a round trip through JSON."""
        known = {name: record[name] for name in cls.__dataclass_fields__}
        known["points"] = [(int(t), float(v)) for t, v in known["points"]]
        known["window"] = (float(known["window"][0]), int(known["window"][1]))
        return cls(**known)


class Saver:
    """Saves and restores one stage; without a workdir it does nothing."""

    def __init__(self, workdir: Workdir | None, stage: str, inputs_hash: str) -> None:
        self.workdir, self.stage, self.inputs_hash = workdir, stage, inputs_hash
        self._slot = 0

    @property
    def record_name(self) -> str:
        """`calibrate.<stage>`: the stage's name among the workdir's records."""
        return f"calibrate.{self.stage}"

    def save(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        progress: Progress,
    ) -> None:
        """Publish a checkpoint; the final one also marks the stage as finished.

        Where tensors are sharded, every process must call: they are gathered one by one, and the
        process that has a workdir writes them as if they had never been apart.
        """
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        for name, tensor in slots(parameters, optimizer, progress.complete).items():
            if self.workdir is not None or is_sharded(tensor):
                full = whole(tensor)
                if self.workdir is not None:
                    tensors[name] = full.cpu() if is_sharded(tensor) else full
        if self.workdir is None:
            return
        self._slot = 1 - self._slot
        self.workdir.publish_tensors(f"{FOLDER}/{self.stage}.{self._slot}.safetensors", tensors)
        record = {"inputs": self.inputs_hash, "slot": self._slot, **asdict(progress)}
        self.workdir.publish_json(f"{FOLDER}/{self.stage}.json", record)
        if progress.complete:
            self.workdir.mark(self.record_name, self.inputs_hash)

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[Progress, dict[str, Tensor]] | None:
        """The last checkpoint of the same inputs, if there is one: progress, and whole tensors.

        The tensors go by the names of `slots`, which decides where each belongs.

        Raises:
            OutputError: a checkpoint is there but cannot be read.
        """
        if self.workdir is None:
            return None
        finished = self.workdir.has(self.record_name, self.inputs_hash)
        path = self.workdir.path(f"{FOLDER}/{self.stage}.json")
        if not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            record = json.loads(path.read_text("utf-8"))
            if record["inputs"] != self.inputs_hash:
                return None
            self._slot = int(record["slot"])
            tensors = load_file(path.with_name(f"{self.stage}.{self._slot}.safetensors"))
            progress = Progress.from_json(record)
            for name, target in slots(parameters, optimizer, progress.complete).items():
                if tensors[name].shape != target.shape:
                    raise ValueError(f"{name} is {tuple(tensors[name].shape)}")
            torch.set_rng_state(tensors.pop("rng"))
        except (SafetensorError, ValueError, KeyError, RuntimeError, OSError) as problem:
            raise OutputError(
                "a calibration checkpoint cannot be read",
                where=str(path),
                why=f"{type(problem).__name__}: {problem}",
                next_step=f"remove {path.parent} and run again: the stage starts anew",
            ) from problem
        if progress.complete and not finished:
            self.workdir.mark(self.record_name, self.inputs_hash)
        return progress, tensors


def slots(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, complete: bool
) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: weights, and AdamW's state unless the stage is complete."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        found[f"weight/{name}"] = parameter
        if not complete:
            state = optimizer.state[parameter]
            found[f"mean/{name}"] = state["exp_avg"]
            found[f"square/{name}"] = state["exp_avg_sq"]
            found[f"steps/{name}"] = state["step"]
    return found
