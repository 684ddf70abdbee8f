"""Sizes an owner is told as numbers: `forward(hidden, height, width)`.

A graph knows them as sizes of the model's input. Height and width are often equal in an example,
so where a value could be several arguments a second call decides, on an oblong image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reattend.capture import Capture, watch_all
from reattend.errors import ReattendError
from reattend.install.binding import bound, leaves
from reattend.install.pieces import Path
from reattend.passes.evaluate import Evaluator


class CallSizes:
    """Finds the whole numbers of one owner's call that sizes in the graph stand for.

    Args:
        captured: the graph.
        path: of the owner.
        number: which of its calls.
        arguments: of the watched call, by name.
    """

    def __init__(
        self, captured: Capture, path: str, number: int, arguments: dict[str, Any]
    ) -> None:
        self.captured, self.path, self.number = captured, path, number
        self.numbers = {at: leaf for at, leaf in leaves(arguments) if type(leaf) is int}
        self._second: tuple[dict[Path, Any], dict[fx.Node, Any]] | None = None

    def place(self, node: fx.Node) -> Path | None:
        """The argument whose value `node` is; None if there is none, or no telling which."""
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt) or not self.numbers:
            return None
        hits = [at for at, number in self.numbers.items() if number == int(value.node.hint)]
        if len(hits) > 1:
            hits = [at for at in hits if self._again(at, node)]
        return hits[0] if len(hits) == 1 else None

    def _again(self, at: Path, node: fx.Node) -> bool:
        """Whether argument and size are equal in the oblong call too."""
        if self._second is None:
            self._second = self._oblong()
        arguments, given = self._second
        if at not in arguments:
            return False
        made: Any = Evaluator(self.captured.gm).run([node], given)[0]
        return bool(int(made) == arguments[at])

    def _oblong(self) -> tuple[dict[Path, Any], dict[fx.Node, Any]]:
        """The numbers of the call for images of another shape, and that call's inputs.

        As many pixels as before first: some models have a position for each.
        """
        for reshape in (_low, _wide):
            inputs = {n: reshape(v) if _image(v) else v for n, v in self.captured.inputs.items()}
            try:
                calls = watch_all(self.captured.model, {self.path}, inputs)[self.path]
            except (ReattendError, RuntimeError, KeyError):  # one size of image only
                continue
            call = calls[self.number]
            module = self.captured.model.get_submodule(self.path)
            arguments = dict(leaves(bound(module, call.args, call.kwargs)))
            return arguments, self.captured.placeholders(inputs)
        return {}, {}


def _low(image: Tensor) -> Tensor:
    """Half as high and twice as wide."""
    half = image[..., : image.shape[-2] // 2, :]
    return torch.cat([half, half], -1)


def _wide(image: Tensor) -> Tensor:
    """Twice as wide."""
    return torch.cat([image, image], -1)


def _image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
