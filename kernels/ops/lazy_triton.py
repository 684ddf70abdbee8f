"""The Triton kernels are imported at the first launch on a GPU, never before."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from reattend.errors import MissingExtraError


def load_launch(module: str) -> Any:
    """Import a launcher module, and with it Triton.

    Args:
        module: full name, such as ``reattend.kernels.attention.launch``.

    Raises:
        MissingExtraError: Triton is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingExtraError(
            "the GPU kernels need Triton, which is not installed",
            where=module,
            next_step="pip install 'reattend[gpu]', or move the model to the CPU",
        ) from error
