"""What a class of sparse heads becomes in ONNX: the node, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """A state beside keys and values: [B, G, rows, width], its rows as of a `StateTensor`."""

    name: str
    width: int
    block: int = 1
    rows: int = 0
    per_block: int = 0


@dataclass(frozen=True)
class SparseForm:
    """What a class of heads becomes.

    Attributes:
        op: the node.
        rows, block, per_block, ring: of the states of keys and values, as of a `StateTensor`.
        sinks, window: of a state of bounded size.
        saves: what of the pattern's saving the file has, for the manifest.
        extra: further states, for what chooses at run time.
        tokens: where keys are chosen at run time, a text so long leaves something out, unless that
            would be more than an export is checked with; else 0.
    """

    op: str
    rows: int = 0
    block: int = 1
    per_block: int = 0
    ring: bool = False
    sinks: int = 0
    window: int = 0
    saves: str = ""
    extra: tuple[Extra, ...] = ()
    tokens: int = 0
