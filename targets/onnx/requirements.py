"""The optional packages of this target, imported late and named when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from reattend.errors import MissingExtraError

_INSTALL = "pip install 'reattend[onnx]'"


def need(package: str, purpose: str) -> Any:
    """Import an optional package.

    Raises:
        MissingExtraError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {package.partition('.')[0]!r}, which is not installed",
            why=str(error),
            next_step=_INSTALL,
        ) from error


def need_exporter() -> None:
    """Everything that writing an ONNX file uses, asked for before any work is done.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    for package in ("onnx", "onnx_ir", "onnxscript"):
        need(package, "ONNX export")
    need("onnxruntime", "checking the exported model")
