"""What a binding stores about an owner that does more than its block: programs and their inputs."""

from __future__ import annotations

from typing import Literal, NamedTuple

from reattend.mixers.config import Frozen
from reattend.program import Program

Path = tuple[str | int, ...]
#: `CacheAt.part` of a module that writes to both parts of an encoder-decoder cache
BOTH = "both"


class CacheAt(NamedTuple):
    """Where a module keeps its cache.

    Attributes:
        path: the leaf of its call that is the cache; None: it has none.
        part: of an encoder-decoder cache; `BOTH` where it is each of the two.
        layer_idx: layer of the cache.
        shift: the leaf, a number, that is added to `layer_idx` in each call; `()` where several
            calls use several layers and no argument says which.
    """

    path: Path | None = None
    part: str | None = None
    layer_idx: int = 0
    shift: Path | None = None


#: keys beside the arguments of a call; the dot keeps them apart from parameter names
BEFORE, MIXED, AFTER = "before.", "mixed.", "after."


class Feed(Frozen):
    """One input of a program: a leaf of the call (or of what stands beside it), or its size."""

    path: Path
    axis: int | None = None


class FixedLeaf(Frozen):
    """An argument that is as it was at capture: a number, or a tensor of these sizes."""

    path: Path
    number: int | None = None
    sizes: tuple[int | None, ...] = ()


class HandedOn(Frozen):
    """Keys or values that a call leaves in a mapping among its arguments, for later blocks.

    Attributes:
        container: the leaf's way to the mapping.
        key: under which they stand there.
        streams: `k` and `v` in the order of a tuple; one of them where they stand alone.
        heads: of each, as the model has them [B, heads, M, d].
        columns: for each the number of the mixer's [G d] that stands there.
    """

    container: Path
    key: str | int
    streams: tuple[Literal["k", "v"], ...]
    alone: bool
    heads: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]


class Piece(Frozen):
    """A program and where its inputs come from, in order."""

    program: Program
    feeds: tuple[Feed, ...]


class AroundConfig(Frozen):
    """The programs of one owner.

    Attributes:
        before: the mixer's inputs (`hidden`, `memory`, `mask`, `cos`, `sin`) that are not
            arguments of the owner; a binding reads them at (BEFORE, name).
        after: tensors of the owner's result; a binding's `output` reads them at (AFTER, number).
        stepwise: with a cache, where each call brings only the new tokens, the programs give the
            same; False where they mix tokens or count them.
        dropout: the owner drops activations while training, which the programs do not.
    """

    before: dict[str, Piece] = {}
    after: tuple[Piece, ...] = ()
    stepwise: bool = True
    dropout: bool = False

    def pieces(self) -> dict[str, Piece]:
        """Every piece by the name of its module in the adapter."""
        named = {f"before.{name}": piece for name, piece in self.before.items()}
        return named | {f"after.{number}": piece for number, piece in enumerate(self.after)}


def block_output(shape: object) -> bool:
    """Whether a leaf of `Binding.output` is made of the mixer's y."""
    if shape == "y":
        return True
    path = shape.get("path") if isinstance(shape, dict) else None
    return path is not None and path[0] == AFTER
