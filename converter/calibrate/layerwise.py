"""Stage 1: every converted block against its own block of the teacher, behind its projection.

Inputs and targets come from the teacher's stream, so errors do not build up from layer to layer
and nothing is propagated through the stack. One pass of the teacher feeds all sites: a hook on
each teacher block runs the student's block on the very arguments of that call, adds its gradient
and drops its activations, so memory holds one block's activations at a time. The sites remain
independent (gradient, clipping and AdamW are their own); only the teacher's pass is shared, and
so paid once instead of once per site. In exchange a checkpoint holds all sites at one step, and
resuming continues all of them. The teacher stops after its last site: no logits are formed.
Where the plan asks for relations (`relations.py`), they are added to what is trained.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reattend.calibrate.losses import squared_error
from reattend.calibrate.ranks import Ranks
from reattend.calibrate.relations import Relations
from reattend.calibrate.sites import (
    adapters,
    attention_output,
    call_arguments,
    decoder_prefix,
    hooked,
    is_below,
    projection_of,
    real_tokens,
)
from reattend.calibrate.stage import Stage, counted, finite_or_raise
from reattend.calibrate.working import Working
from reattend.errors import ArgumentError


class _EnoughError(Exception):
    """Ends a teacher pass once every site has had its calls."""


class Layerwise(Stage):
    """Normalised mean squared error of each block's output."""

    name: ClassVar[str] = "layerwise"
    loss_name: ClassVar[str] = "|y - t|^2 / |t|^2, mean over sites"
    lr: ClassVar[float] = 2e-3
    floor: ClassVar[float] = 1e-10
    far: ClassVar[float] = 0.1

    def __init__(self, working: Working, ranks: Ranks, relations: Relations | None = None) -> None:
        super().__init__(working, ranks)
        self.relations = relations
        self.adapters = adapters(working.student, working.teacher)
        if not self.adapters:
            raise ArgumentError(
                "stage layerwise needs converted blocks that stand in a module of their own",
                next_step="calibrate with stages: [end-to-end]",
            )
        self.projections: dict[str, str] = {}
        for path, adapter in self.adapters.items():
            held = {id(p) for p in adapter.parameters()}
            projection = projection_of(working.student, adapter)
            if projection is not None:
                self.projections[path] = projection
                held |= {id(p) for p in working.student.get_submodule(projection).parameters()}
            names = [n for n, p in working.masters.items() if id(p) in held and p.requires_grad]
            if names:
                self.groups[path] = names
        self.decoder = decoder_prefix(working.teacher)
        self.calls: int | None = None  # block calls in one full pass; learned from the first

    def accumulate(self, inputs: dict[str, Tensor], silent: bool) -> dict[str, Tensor]:
        """See `Stage.accumulate`."""
        teacher = self.working.teacher
        arguments = call_arguments(teacher, inputs)
        losses: dict[str, Tensor] = {}
        seen = 0

        def visit(path: str, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal seen
            adapter = self.adapters[path]
            target = attention_output(adapter.binding.output, output)
            if target is not None:
                target = self._projected(teacher, path, target)
                real = real_tokens(arguments, target, is_below(path, self.decoder))
                finite_or_raise(target, path, real)
                real = counted(real, target, silent)
                relations = self.relations
                heard = nullcontext() if relations is None else relations.listening(adapter.mixer)
                with torch.enable_grad():
                    with heard:
                        y = attention_output(adapter.binding.output, adapter(*args, **kwargs))
                    assert y is not None
                    y = self._projected(self.working.student, path, y)
                    gap, size = squared_error(y, target, real)
                    total, norm = self.ranks.sum(gap, size)
                    scale = norm.clamp_min(torch.finfo(torch.float32).tiny).to(gap.dtype)
                    asked = gap / scale
                    if relations is not None:  # trained, not told: the loss is the output's alone
                        apart, tokens = relations.loss(path, adapter.mixer, real)
                        (tokens,) = self.ranks.sum(tokens)
                        asked = asked + apart / tokens.clamp_min(1)
                    self.backward(asked, adapter, silent)
                    adapter.mixer.let_go()
                loss = total.detach() / scale
                losses[path] = losses[path] + loss if path in losses else loss
            seen += 1
            if seen == self.calls:
                raise _EnoughError

        handles = [self._watch(path, visit) for path in self.groups]
        with hooked(handles), torch.no_grad():
            try:
                teacher(**arguments)
            except _EnoughError:
                pass
            else:
                self.calls = seen
        return losses

    def _projected(self, model: nn.Module, path: str, y: Tensor) -> Tensor:
        """A block's output behind its projection, also where another module owns that."""
        projection = self.projections.get(path)
        if projection is None:
            return y
        projected: Tensor = model.get_submodule(projection)(y)
        return projected

    def _watch(self, path: str, visit: Any) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            visit(path, args, kwargs, output)

        module = self.working.teacher.get_submodule(path)
        return module.register_forward_hook(hook, with_kwargs=True)
