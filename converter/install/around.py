"""An owner's own graph around its mixer: what it does to its arguments before, to y afterwards.

Some modules hold more than the block: a norm before it, a residual after it, a window partition
on both sides. What they do themselves is carried along as it was captured (`reattend.program`),
so the mixer still receives the block's input and still returns the block's output.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from reattend.errors import ArgumentError
from reattend.install.binding import read
from reattend.install.pieces import AFTER, BEFORE, MIXED, AroundConfig, Feed
from reattend.program import ProgramModule

#: inputs of a mixer that a call may leave out
_OPTIONAL = ("memory", "mask")


class Around(nn.Module):
    """The programs of one owner with their weights: `before.<name>` and `after.<number>`."""

    def __init__(self, config: AroundConfig) -> None:
        super().__init__()
        self.config = config
        self.before = nn.ModuleDict({n: ProgramModule(p.program) for n, p in config.before.items()})
        self.after = nn.ModuleList([ProgramModule(piece.program) for piece in config.after])

    def prepare(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call, and beside them what `before` makes of them.

        Raises:
            ArgumentError: an argument is missing that the owner had when it was captured.
        """
        made: dict[str, Any] = {}
        for name, piece in self.config.before.items():
            inputs = self._inputs(piece.feeds, arguments, name in _OPTIONAL)
            made[name] = None if inputs is None else self.before[name](*inputs)
        return {**arguments, BEFORE: made}

    def finish(self, arguments: dict[str, Any], y: Tensor) -> dict[str, Any]:
        """The prepared arguments, and beside them what the owner's own graph makes of `y`."""
        arguments = {**arguments, MIXED: y}
        made = [
            module(*(self._inputs(piece.feeds, arguments) or ()))
            for module, piece in zip(self.after, self.config.after, strict=True)
        ]
        return {**arguments, AFTER: made}

    def _inputs(
        self, feeds: tuple[Feed, ...], arguments: dict[str, Any], optional: bool = False
    ) -> list[Any] | None:
        """Values of a program's inputs; None if one is missing that may be."""
        found = []
        for feed in feeds:
            leaf = read(arguments, feed.path)
            if leaf is None:
                if optional:
                    return None
                raise ArgumentError(
                    f"a converted layer needs the argument {feed.path[0]!r}",
                    why="the module it replaced was captured with it",
                    next_step=f"call the model so that {feed.path[0]!r} is passed again",
                )
            found.append(leaf if feed.axis is None else leaf.shape[feed.axis])
        return found
