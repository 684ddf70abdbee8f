"""Stage 2: the whole student against the whole teacher.

Loss per real token: KL(teacher || student) of the next-token distributions, plus
`HIDDEN_WEIGHT` times the normalised mean squared error of the hidden states after each repeated
block, averaged over blocks. Only the mixers and their output projections are trained.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reattend.calibrate.losses import divergence, squared_error
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.shards import shard, unshard
from reattend.calibrate.sites import (
    block_paths,
    call_arguments,
    decoder_prefix,
    first_tensor,
    hooked,
    is_below,
    logits,
    real_tokens,
)
from reattend.calibrate.stage import Stage, counted, finite_or_raise
from reattend.calibrate.working import Working
from reattend.errors import ArgumentError

HIDDEN_WEIGHT = 1.0


class EndToEnd(Stage):
    """Logits and hidden states of the whole model."""

    name: ClassVar[str] = "end-to-end"
    loss_name: ClassVar[str] = "KL in nats per token + hidden-state |y - t|^2 / |t|^2"
    lr: ClassVar[float] = 1e-3
    floor: ClassVar[float] = 1e-6
    far: ClassVar[float] = 0.3

    def __init__(self, working: Working, ranks: Ranks) -> None:
        super().__init__(working, ranks)
        self.groups = {"": [n for n, p in working.masters.items() if p.requires_grad]}
        self.blocks = block_paths(working.student)
        self.decoder = decoder_prefix(working.teacher)
        self._broken = ""
        self._places: dict[str, tuple[nn.Module, str]] = {}
        if ranks.sharded:
            self._shard()

    def _shard(self) -> None:
        """Spread both working copies over the processes; the masters become their shares."""
        working = self.working
        self.ranks.same(working.masters.values())
        shard(working.teacher, self.blocks)
        places = shard(working.student, self.blocks)
        self._places = {n: places[id(p)] for n, p in working.masters.items()}
        self._refresh()

    def _refresh(self) -> None:
        for name, (module, attribute) in self._places.items():
            found = module._parameters[attribute]
            assert found is not None
            self.working.masters[name] = found

    def close(self) -> None:
        """See `Stage.close`."""
        if self._places:
            unshard(self.working.student)
            self._refresh()

    def accumulate(self, inputs: dict[str, Tensor], silent: bool) -> dict[str, Tensor]:
        """See `Stage.accumulate`."""
        teacher, student = self.working.teacher, self.working.student
        arguments = call_arguments(teacher, inputs)
        with torch.no_grad():
            target, wanted = self._watched(teacher, arguments)
        guess, hidden = self._watched(student, arguments)
        self._broken = next((p for p in hidden if not _finite(hidden[p])), "")
        parts: list[Tensor] = []
        pairs = [(p, hidden[p], wanted[p]) for p in self.blocks if p in hidden and p in wanted]
        for path, y, t in pairs:
            real = real_tokens(arguments, t, is_below(path, self.decoder))
            finite_or_raise(t, path, real)
            gap, size = squared_error(y, t, counted(real, t, silent))
            (norm,) = self.ranks.sum(size)
            part = gap / norm.clamp_min(torch.finfo(torch.float32).tiny).to(gap.dtype)
            parts.append(HIDDEN_WEIGHT / len(pairs) * part)
        if target is not None and guess is not None:
            parts.append(self._divergence(guess, target, arguments, silent))
        if not parts:
            raise ArgumentError(
                "stage end-to-end finds neither logits nor blocks to compare",
                where=type(student).__name__,
                next_step="calibrate with stages: [layerwise]",
            )
        loss = torch.stack([part.to(parts[0].device) for part in parts]).sum()
        self.backward(loss, student, silent)
        (total,) = self.ranks.sum(loss.detach())
        return {"": total}

    def blame(self, group: str) -> str:
        """The first block whose hidden states are not numbers."""
        return self._broken or "output"

    def _divergence(
        self, guess: Tensor, target: Tensor, arguments: dict[str, Any], silent: bool
    ) -> Tensor:
        real = real_tokens(arguments, target, self.decoder is not None)
        finite_or_raise(target, "logits", real)
        real = counted(real, target, silent)
        rows = target.shape[0] * (target.shape[1] if target.dim() == 3 else 1)
        count = real.sum() if real is not None else torch.tensor(rows, device=target.device)
        (count,) = self.ranks.sum(count)
        return divergence(guess, target, real) / count.clamp_min(1)

    def _watched(
        self, model: nn.Module, arguments: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits, and the hidden states after each block."""
        hidden: dict[str, Tensor] = {}
        with hooked([_keep(model.get_submodule(p), p, hidden) for p in self.blocks]):
            return logits(model(**arguments)), hidden


def _keep(module: nn.Module, path: str, into: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        if found is not None:
            into[path] = found

    return module.register_forward_hook(hook)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach().sum()))
