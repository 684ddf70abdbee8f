"""reattend's own kernels for ONNX Runtime: a library that takes over the nodes of `ai.reattend`.

It is built from `kernels/csrc` and is no part of the Python package. A file runs without it, by the
function bodies it holds; with it, one kernel replaces the forty operators of a body. It has kernels
for `Attention` and `LatentAttention` in float32 and float16 on the CPU; nodes of sparse heads keep
their bodies. ONNX Runtime does not fall back to a body for a type that a registered kernel lacks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reattend.errors import ArgumentError, MissingExtraError

BUILT = Path(__file__).resolve().parents[2] / "kernels/csrc/build/libreattend_onnx.so"
BUILD = "python kernels/csrc/build.py"
CPU = "CPUExecutionProvider"


def find_library(given: str | Path | None = None) -> Path:
    """The library's file: the given one, else the one built in this checkout.

    Raises:
        MissingExtraError: it is not there; the message says how to build it.
    """
    path = BUILT if given is None else Path(given)
    if not path.is_file():
        raise MissingExtraError(
            "the library of reattend's ONNX kernels is not there",
            where=str(path),
            why="it is built from a checkout: g++ and the headers of ONNX Runtime are needed",
            next_step=f"{BUILD} (its --help says more), or run the file without: library=False",
        )
    return path


def register(options: Any, path: Path, providers: list[str]) -> None:
    """Let the sessions made with `options` use the library.

    Raises:
        ArgumentError: another provider than the CPU's is wanted; the library has no kernels for it.
        MissingExtraError: the file cannot be loaded.
    """
    if providers != [CPU]:
        raise ArgumentError(
            "reattend's ONNX kernels run on the CPU only",
            where=f"library={str(path)!r}, providers={providers}",
            next_step="leave the providers out, or run the file without: library=False",
        )
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # whatever the loader of the system says
        raise MissingExtraError(
            "the library of reattend's ONNX kernels cannot be loaded",
            where=str(path),
            why=str(error).strip().splitlines()[0],
            next_step=f"build it again: {BUILD}",
        ) from error
