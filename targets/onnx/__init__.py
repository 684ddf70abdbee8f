"""The ONNX target: `export_onnx` writes a folder, `Session` runs it in ONNX Runtime, and
`EncoderSession` a model without caches.

Importing this package imports neither onnx nor onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reattend.targets.onnx.encoder_session import EncoderSession
    from reattend.targets.onnx.export import Artifact, export_onnx
    from reattend.targets.onnx.session import Session

__all__ = ["Artifact", "EncoderSession", "Session", "export_onnx"]

_HOMES = {
    "Artifact": "reattend.targets.onnx.export",
    "EncoderSession": "reattend.targets.onnx.encoder_session",
    "Session": "reattend.targets.onnx.session",
    "export_onnx": "reattend.targets.onnx.export",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
